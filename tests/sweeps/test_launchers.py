"""The two launchers and the server that forks, which here imports nothing; test_sweep_fork.py has
it import the trainer.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from foundry_ext.config.loading import UsageError
from foundry_ext.sweeps.launchers import ForkLauncher, can_fork, resolve
from foundry_ext.sweeps.run import run_sweep
from foundry_ext.sweeps.state import is_free, read_state
from tests.sweeps.kit import ROOT, enter, lines, names, run, run_and_kill, wait_for, write_sweep

SEEDS = {"seed": {"values": [17, 18]}}
SERVER = (
    "-c",
    "import sys; from foundry_ext.sweeps import fork_server as s; s.import_all = lambda: None;"
    "sys.exit(s.main())",
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(ForkLauncher, "SERVER", SERVER)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return enter(tmp_path, monkeypatch)


CODE = """
import sys
from foundry_ext.cli.main import main
from foundry_ext.sweeps.launchers import ForkLauncher
ForkLauncher.SERVER = {server!r}
sys.exit(main("sweep sweep.yaml --launcher {launcher} --parallel 2 --yes".split()))
"""


def start(
    folder: Path, server: tuple[str, ...] = SERVER, launcher: str = "fork"
) -> subprocess.Popen[str]:
    """`foundry-ext sweep sweep.yaml --launcher fork --parallel 2 --yes`, with the light server."""
    return subprocess.Popen(
        [sys.executable, "-c", CODE.format(server=server, launcher=launcher)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_forked_runs_end_as_subprocesses_do(folder: Path):
    path = write_sweep(folder, {**SEEDS, "variables.behaviour": {"values": ["good", "fail"]}})
    outcomes = run_sweep(path, launcher="fork", parallel=2)
    ended = {(one.status, one.exit_code) for one in outcomes if "fail" in one.name}
    assert ended == {("failed", 3)}
    good = [one for one in outcomes if "good" in one.name]
    assert {(one.status, one.exit_code) for one in good} == {("finished", 0)}
    for one in good:
        assert f"the log of {one.name}" in one.log.read_text()
        (started,) = lines(folder, one.name, "starts")
        threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
        assert json.loads(started.partition(" ")[2]) == {"OMP_NUM_THREADS": threads}
        assert is_free(folder / "outputs/sweeps/stand-in/locks" / one.name)
    assert is_free(folder / "outputs/sweeps/stand-in/lock")


def test_forking_is_the_choice_where_it_can_be(folder: Path, monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    run_sweep(write_sweep(folder, {}), dry_run=True, say=said.append)
    expected = "subprocess" if Path("/dev/nvidia0").exists() else "fork"
    assert f"launcher {expected}" in said[0]
    two = ["composer", "-n", "2", "${program}", "${args_no_hyphens}"]
    path = write_sweep(folder, {}, command=two)
    run_sweep(path, dry_run=True, say=said.append)
    assert "launcher subprocess" in "".join(said[1:])
    with pytest.raises(UsageError, match=r"launcher fork is for one rank: composer -n 2 train"):
        run_sweep(path, launcher="fork")
    with pytest.raises(UsageError, match="launcher fork is for a CPU"):
        run_sweep(write_sweep(folder, {}), launcher="fork", gpus=["0"])
    with pytest.raises(UsageError, match="'thread', is neither fork nor subprocess"):
        run_sweep(write_sweep(folder, {}), launcher="thread")


def test_commands_are_those_of_this_environment():
    assert resolve(("composer", "-n", "2", "train.py")) == [
        *(sys.executable, "-m", "composer.cli.launcher", "-n", "2", "train.py")
    ]
    env = ("/usr/bin/env", "python", "train.py")
    assert resolve(env) == ["/usr/bin/env", sys.executable, "train.py"]
    assert resolve(("bash", "composer")) == ["bash", "composer"]
    assert can_fork(env, "train.py") and not can_fork(("python", "-O", "t.py"), "t.py")


def test_a_server_that_dies_is_one_clear_error(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ForkLauncher, "SERVER", ("-c", "raise SystemExit(7)"))
    with pytest.raises(ChildProcessError, match=r"exit code 7; see .*fork_server\.log"):
        run_sweep(write_sweep(folder, SEEDS), launcher="fork")
    monkeypatch.setattr(ForkLauncher, "SERVER", SERVER)
    outcomes = run_sweep(folder / "sweep.yaml", launcher="fork", parallel=4)
    assert {one.status for one in outcomes} == {"finished"}


def test_ctrl_c_ends_forked_runs(folder: Path):
    write_sweep(folder, {"variables.seconds": {"value": 30}})
    sweep = start(folder)
    wait_for(lambda: len(list(folder.glob("outputs/*/record.json"))) == 2)
    sweep.send_signal(signal.SIGTERM)
    out, _ = sweep.communicate(timeout=30)
    assert sweep.returncode == 130, out
    state = read_state(folder / "outputs/sweeps/stand-in/state.json")
    assert {one.status for one in state.values()} == {"stopped"}
    assert all(is_free(folder / "outputs/sweeps/stand-in/locks" / name) for name in state)


def test_ctrl_c_does_not_wait_for_imports(folder: Path):
    write_sweep(folder, {})
    slow = SERVER[1].replace("lambda: None", "lambda: __import__('time').sleep(60)")
    sweep = start(folder, ("-c", slow))
    wait_for((folder / "outputs/sweeps/stand-in/fork_server.log").exists)
    time.sleep(0.3)
    sweep.send_signal(signal.SIGINT)
    out, _ = sweep.communicate(timeout=20)
    assert sweep.returncode == 130, out
    assert names(folder) == []
    statuses, _ = run(folder / "sweep.yaml")
    assert set(statuses.values()) == {"finished"}


@pytest.mark.parametrize("launcher", ["fork", "subprocess"])
def test_a_second_ctrl_c_kills_what_is_deaf_to_the_first(folder: Path, launcher: str):
    stubborn = {"variables.behaviour": {"value": "stubborn"}, "variables.seconds": {"value": 60}}
    write_sweep(folder, stubborn)
    sweep = start(folder, launcher=launcher)
    wait_for(lambda: len(list(folder.glob("outputs/*/record.json"))) == 2)
    sweep.send_signal(signal.SIGINT)
    time.sleep(0.6)
    assert sweep.poll() is None
    sweep.send_signal(signal.SIGINT)
    out, _ = sweep.communicate(timeout=20)
    assert sweep.returncode == 130, out
    locks = list((folder / "outputs/sweeps/stand-in/locks").iterdir())
    assert len(locks) == 2 and all(map(is_free, locks))


@pytest.mark.parametrize("launcher", ["fork", "subprocess"])
def test_what_a_killed_sweep_left_running_is_waited_for(folder: Path, launcher: str):
    path = write_sweep(folder, {"variables.seconds": {"value": 4}})
    sweep = start(folder, launcher=launcher)
    wait_for(lambda: len(list(folder.glob("outputs/*/record.json"))) == 2)
    sweep.kill()
    sweep.communicate()
    locks = list((folder / "outputs/sweeps/stand-in/locks").iterdir())
    assert len(locks) == 2 and not any(map(is_free, locks))
    statuses, said = run(path)
    assert statuses == dict.fromkeys(["a-seconds_4", "b-seconds_4"], "finished")
    assert "0 to start, 0 finished already, 2 still running" in said[0]
    assert sum("still running since an earlier sweep" in line for line in said) == 2
    assert [len(lines(folder, name, "starts")) for name in statuses] == [1, 1]


def test_a_forking_sweep_killed_at_random_moments_ends_with_every_run_once(folder: Path):
    write_sweep(folder, {"seed": {"values": [1, 2, 3]}, "variables.seconds": {"value": 1}})
    run_and_kill(folder, lambda: start(folder), lambda _: [])
    assert len(names(folder)) == 6
    for name in names(folder):
        assert len(lines(folder, name, "starts")) == len(lines(folder, name, "ends")) == 1, name
        assert lines(folder, name, "overlaps") == []
