"""The fork server of a sweep: its errors, its end, and other fork servers; it imports nothing."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from foundry_ext.sweeps.run import run_sweep
from foundry_ext.sweeps.state import is_free
from tests.sweeps.kit import LIGHT, lines, run, server_of, start_light, wait_for, write_sweep

SEEDS = {"seed": {"values": [17, 18]}}


def test_a_server_that_dies_is_one_clear_error(folder: Path, monkeypatch: pytest.MonkeyPatch):
    (folder / "preloaded.py").write_text("raise SystemExit(7)")
    with pytest.raises(ChildProcessError, match=r"exit code 7; see .*fork_server\.log"):
        run_sweep(write_sweep(folder, SEEDS), launcher="fork")
    (folder / "preloaded.py").write_text(LIGHT)
    outcomes = run_sweep(folder / "sweep.yaml", launcher="fork", parallel=4)
    assert {one.status for one in outcomes} == {"finished"}


def test_an_import_that_fails_is_in_the_log_of_the_server(folder: Path):
    (folder / "composer.py").write_text("import no_such_module")
    (folder / "preloaded.py").write_text("import foundry_ext.sweeps.preload")
    write_sweep(folder, SEEDS)
    sweep = start_light(folder)
    out, _ = sweep.communicate(timeout=30)
    assert sweep.returncode == 2, out
    assert "exit code 1; see outputs/sweeps/stand-in/fork_server.log" in out
    log = (folder / "outputs/sweeps/stand-in/fork_server.log").read_text()
    assert "No module named 'no_such_module'" in log


def test_runs_outlive_a_server_that_is_killed(folder: Path):
    path = write_sweep(folder, {"variables.seconds": {"value": 5}})
    sweep = start_light(folder)
    wait_for(lambda: len(list(folder.glob("outputs/*/record.json"))) == 2)
    os.kill(server_of(sweep.pid), signal.SIGKILL)
    out, _ = sweep.communicate(timeout=20)
    assert sweep.returncode == 2 and "exit code -9; see outputs/sweeps/" in out
    statuses, said = run(path)
    assert set(statuses.values()) == {"finished"}
    assert "0 to start, 0 finished already, 2 still running" in said[0]
    assert [len(lines(folder, name, "starts")) for name in statuses] == [1, 1]


UNGUARDED = """
from foundry_ext.sweeps.fork_launcher import ForkLauncher
from foundry_ext.sweeps.run import run_sweep
ForkLauncher.PRELOAD = "preloaded"
for name in ("sweep.yaml", "second.yaml"):
    print(*(result.status for result in run_sweep(name, launcher="fork")))
"""


def test_a_script_without_a_main_guard_runs_two_sweeps(folder: Path):
    path = write_sweep(folder, {"seed": {"value": 17}})
    second = path.read_text().replace("stand-in", "second").replace("17", "18")
    (folder / "second.yaml").write_text(second)
    (folder / "script.py").write_text(UNGUARDED)
    done = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\nfinished finished\n") == 2


FOREIGN = """
import multiprocessing, sys
from pathlib import Path
from foundry_ext.sweeps.fork_launcher import ForkLauncher
from foundry_ext.sweeps.run import run_sweep
ForkLauncher.PRELOAD = "preloaded"
if __name__ == "__main__":
    context = multiprocessing.get_context("forkserver")
    first = context.Process(target=print, args=("the first",))
    first.start()
    try:
        run_sweep("sweep.yaml", launcher="fork")
    except ChildProcessError as error:
        print(error)
    Path("preloaded.py").write_text(sys.argv[1])
    print(*(result.status for result in run_sweep("sweep.yaml", launcher="fork", parallel=2)))
    second = context.Process(target=print, args=("the second",))
    second.start()
    second.join()
    print("exit codes", first.exitcode, second.exitcode)
"""


def test_a_program_with_a_fork_server_of_its_own_keeps_it(folder: Path):
    """Runs come from ours, though the other one, which has not imported the trainer, is alive."""
    write_sweep(folder, {})
    (folder / "preloaded.py").write_text("raise SystemExit(7)")
    (folder / "script.py").write_text(FOREIGN)
    ours = f"{LIGHT}; os.environ['RANK'] = 'ours'"
    command = [sys.executable, "script.py", ours]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "exit code 7; see outputs/sweeps/stand-in/fork_server.log\n" in done.stdout
    assert "\nfinished finished\n" in done.stdout
    for name in ("a", "b"):
        (started,) = lines(folder, name, "starts")
        assert json.loads(started.partition(" ")[2])["RANK"] == "ours"
    assert "the first\n" in done.stdout and "the second\n" in done.stdout
    assert done.stdout.endswith("exit codes 0 0\n")


KILLED_WITHIN_A_REQUEST = """
import os, signal
from multiprocessing.forkserver import ForkServer
request = ForkServer.connect_to_new_process

def die(server, fds):
    print(server._forkserver_pid, flush=True)
    os.kill(server._forkserver_pid, signal.SIGSTOP)
    try:
        request(server, fds)
    finally:
        os.kill(os.getpid(), signal.SIGKILL)

ForkServer.connect_to_new_process = die
"""


def test_locks_are_held_while_a_server_may_fork_for_a_killed_sweep(folder: Path):
    path = write_sweep(folder, {})
    sweep = start_light(folder, more=KILLED_WITHIN_A_REQUEST)
    out, _ = sweep.communicate(timeout=30)
    assert sweep.returncode == -signal.SIGKILL, out
    locks = folder / "outputs/sweeps/stand-in"
    try:
        assert not is_free(locks / "lock") and not is_free(locks / "locks/a")
    finally:
        os.kill(int(out.split()[-1]), signal.SIGCONT)
    statuses, said = run(path)
    assert statuses == {"a": "finished", "b": "finished"}
    assert "2 to start" in said[0]
