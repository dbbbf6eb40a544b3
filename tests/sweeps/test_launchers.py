"""The two launchers. The fork server imports nothing here; in test_sweep_fork.py, the trainer."""

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest

from foundry_ext.sweeps.launchers import can_fork, resolve
from foundry_ext.sweeps.run import run_sweep
from foundry_ext.sweeps.state import is_free, read_state
from foundry_ext.utils.errors import UserError
from tests.sweeps.kit import (
    lines,
    names,
    run,
    run_and_kill,
    server_of,
    start_light,
    wait_for,
    write_sweep,
)

SEEDS = {"seed": {"values": [17, 18]}}


def test_forked_runs_end_as_subprocesses_do(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "3")  # of whoever started the sweep
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
    run_sweep(write_sweep(folder, {}), dry_run=True, echo=said.append)
    expected = "subprocess" if Path("/dev/nvidia0").exists() else "fork"
    assert f"launcher {expected}" in said[0]
    two = ["composer", "-n", "2", "${program}", "${args_no_hyphens}"]
    path = write_sweep(folder, {}, command=two)
    run_sweep(path, dry_run=True, echo=said.append)
    assert "launcher subprocess" in "".join(said[1:])
    with pytest.raises(UserError, match=r"launcher fork is for one rank: composer -n 2 train"):
        run_sweep(path, launcher="fork")
    with pytest.raises(UserError, match="launcher fork is for a CPU"):
        run_sweep(write_sweep(folder, {}), launcher="fork", gpus=["0"])
    with pytest.raises(UserError, match="'thread', is neither fork nor subprocess"):
        run_sweep(write_sweep(folder, {}), launcher="thread")


def test_macos_does_not_fork(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    said: list[str] = []
    run_sweep(write_sweep(folder, {}), dry_run=True, echo=said.append)
    assert "launcher subprocess" in said[0]
    with pytest.raises(UserError, match="launcher fork is for Linux; use launcher subprocess"):
        run_sweep(write_sweep(folder, {}), launcher="fork")


def test_a_temporary_folder_too_long_for_a_socket_is_no_end_of_sweeps(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    long = folder / ("x" * 80)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    said: list[str] = []
    run_sweep(write_sweep(folder, {}), dry_run=True, echo=said.append)
    assert "launcher subprocess" in said[0]


def test_commands_are_those_of_this_environment():
    assert resolve(("composer", "-n", "2", "train.py")) == [
        *(sys.executable, "-m", "composer.cli.launcher", "-n", "2", "train.py")
    ]
    env = ("/usr/bin/env", "python", "train.py")
    assert resolve(env) == ["/usr/bin/env", sys.executable, "train.py"]
    assert resolve(("bash", "composer")) == ["bash", "composer"]
    assert can_fork(env, "train.py") and not can_fork(("python", "-O", "t.py"), "t.py")


PROCESS = """
import atexit, multiprocessing, os, signal, sys
atexit.register(print, "at exit")
print(sys.argv, sys.path[0], __name__)
print(multiprocessing.get_start_method(), multiprocessing.current_process().name)
print(os.getsid(0) == os.getpid(), os.path.samestat(os.fstat(0), os.stat(os.devnull)))
print(signal.getsignal(signal.SIGINT), int(signal.getsignal(signal.SIGTERM)))
kept = [int(n) for n in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{n}")]
kept = [os.readlink(f"/proc/self/fd/{n}") for n in kept if n > 2 and os.get_inheritable(n)]
print("inherited", [path for path in kept if "lock" in path], kept)
sys.excepthook, hook = (lambda *error: (print("the hook"), hook(*error))), sys.excepthook
raise ERROR
"""


@pytest.mark.parametrize("launcher", ["fork", "subprocess"])
def test_the_process_of_a_run(folder: Path, launcher: str):
    path = write_sweep(folder, {"config": {"value": "a.yaml"}})
    (folder / "train.py").write_text(PROCESS.replace("ERROR", "KeyError('planted')"))
    (result,) = run_sweep(path, launcher=launcher)
    assert (result.status, result.exit_code) == ("failed", 1)
    log = result.log.read_text()
    assert f"['train.py', 'config=a.yaml'] {folder.resolve()} __main__\nfork MainProcess\n" in log
    assert "\nTrue True\n<built-in function default_int_handler> 0\n" in log
    assert "KeyError: 'planted'\n" in log and "at exit\n" in log
    assert "the hook\n" in log, "W&B would show the run as finished"
    assert launcher != "fork" or "inherited []" in log, "the lock would outlive the run"


@pytest.mark.parametrize("launcher", ["fork", "subprocess"])
def test_a_run_interrupted_from_outside_is_killed_and_not_failed(folder: Path, launcher: str):
    path = write_sweep(folder, {"config": {"value": "a.yaml"}})
    (folder / "train.py").write_text(PROCESS.replace("ERROR", "KeyboardInterrupt"))
    (result,) = run_sweep(path, launcher=launcher)
    assert (result.status, result.exit_code) == ("killed", -2)
    log = result.log.read_text()
    assert "KeyboardInterrupt\n" in log and "at exit\n" in log and "the hook\n" in log


def test_ctrl_c_ends_forked_runs(folder: Path):
    write_sweep(folder, {"variables.seconds": {"value": 30}})
    sweep = start_light(folder)
    wait_for(lambda: len(list(folder.glob("outputs/*/record.json"))) == 2)
    sweep.send_signal(signal.SIGTERM)
    out, _ = sweep.communicate(timeout=30)
    assert sweep.returncode == 130, out
    state = read_state(folder / "outputs/sweeps/stand-in/state.json")
    assert {one.status for one in state.values()} == {"stopped"}
    assert all(is_free(folder / "outputs/sweeps/stand-in/locks" / name) for name in state)


def test_ctrl_c_does_not_wait_for_imports(folder: Path):
    write_sweep(folder, {})
    (folder / "preloaded.py").write_text("import time; time.sleep(60)")
    sweep = start_light(folder)
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
    sweep = start_light(folder, launcher=launcher)
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
    sweep = start_light(folder, launcher=launcher)
    wait_for(lambda: len(list(folder.glob("outputs/*/record.json"))) == 2)
    server = server_of(sweep.pid) if launcher == "fork" else None
    sweep.kill()
    sweep.communicate()
    # The server leaves with its sweep, before its children end. A zombie has no command line.
    cmdline = Path(f"/proc/{server}/cmdline")
    wait_for(lambda: not cmdline.exists() or not cmdline.read_bytes(), 3.0)
    locks = list((folder / "outputs/sweeps/stand-in/locks").iterdir())
    assert len(locks) == 2 and not any(map(is_free, locks))
    statuses, said = run(path)
    assert statuses == dict.fromkeys(["a-seconds_4", "b-seconds_4"], "finished")
    assert "0 to start, 0 finished already, 2 still running" in said[0]
    assert sum("still running since an earlier sweep" in line for line in said) == 2
    assert [len(lines(folder, name, "starts")) for name in statuses] == [1, 1]


@pytest.mark.parametrize("launcher", ["fork", "subprocess"])
def test_ctrl_c_ends_what_a_killed_sweep_left_running(folder: Path, launcher: str):
    write_sweep(folder, {"variables.seconds": {"value": 60}})
    state = folder / "outputs/sweeps/stand-in/state.json"
    sweep = start_light(folder, launcher=launcher)
    wait_for(lambda: len(list(folder.glob("outputs/*/record.json"))) == 2)
    wait_for(lambda: all(one.pid for one in read_state(state).values()))
    sweep.kill()
    sweep.communicate()
    sweep = start_light(folder, launcher=launcher)
    assert sweep.stdout is not None
    wait_for(lambda: "waiting for it" in sweep.stdout.readline())
    sweep.send_signal(signal.SIGINT)
    out, _ = sweep.communicate(timeout=20)
    assert sweep.returncode == 130, out
    assert {one.status for one in read_state(state).values()} == {"stopped"}
    assert out.count("ending 2 runs") == 1


def test_a_forking_sweep_killed_at_random_moments_ends_with_every_run_once(folder: Path):
    write_sweep(folder, {"seed": {"values": [1, 2, 3]}, "variables.seconds": {"value": 1}})
    run_and_kill(folder, lambda: start_light(folder), lambda _: [])
    assert len(names(folder)) == 6
    for name in names(folder):
        assert len(lines(folder, name, "starts")) == len(lines(folder, name, "ends")) == 1, name
        assert lines(folder, name, "overlaps") == []


@pytest.mark.parametrize("launcher", ["fork", "subprocess"])
def test_texts_arrive_as_they_are(folder: Path, launcher: str):
    texts = ["#b", "a: b\nc", ["x y", "17"], "yes"]
    path = write_sweep(folder, {"config": {"value": "a.yaml"}, "scheduler.note": {"values": texts}})
    outcomes = run_sweep(path, launcher=launcher, parallel=2)
    assert [one.status for one in outcomes] == ["finished"] * 4
    notes = [json.loads(one.record.read_text())["config"]["scheduler"]["note"] for one in outcomes]
    assert notes == texts
    again = run_sweep(path, launcher=launcher)
    assert [one.status for one in again] == ["finished"] * 4
    assert all(len(lines(folder, one.name, "starts")) == 1 for one in again)
