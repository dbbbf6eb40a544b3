"""Locks, the state file, and how a restart treats a run."""

import os
from pathlib import Path

import pytest

from foundry_ext.sweeps.state import (
    RunState,
    claim,
    is_free,
    is_started_again,
    read_state,
    status_at_end,
    status_now,
    write_state,
)


def test_a_lock_lives_as_long_as_a_child_that_inherited_it(tmp_path: Path):
    lock = claim(tmp_path / "lock")
    assert lock is not None and claim(tmp_path / "lock") is None
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(read, 1)
        os._exit(0)
    os.close(lock)
    assert not is_free(tmp_path / "lock")
    os.write(write, b"x")
    os.waitpid(child, 0)
    assert is_free(tmp_path / "lock")


@pytest.mark.parametrize(
    ("status", "record", "expected"),
    [
        ("running", "finished", "finished"),  # ended after the sweep was killed
        ("running", "running", "killed"),
        ("running", "failed", "failed"),
        ("running", None, "killed"),
        ("failed", "failed", "failed"),
        ("failed", None, "failed"),
        ("stopped", "failed", "stopped"),  # by Ctrl-C, which its record calls a failure
        ("waiting", "failed", "failed"),  # started by hand
        ("waiting", "stopped", "stopped"),
        ("waiting", None, "waiting"),
        ("finished", None, "waiting"),  # its folder was removed
        ("finished", "running", "killed"),
    ],
)
def test_what_a_restart_makes_of_a_run(status: str, record: str | None, expected: str):
    assert status_now(RunState(status=status), record) == expected


def test_what_is_started_again():
    again = {s: is_started_again(s, retry_failed=False) for s in ("killed", "stopped", "failed")}
    assert again == {"killed": True, "stopped": True, "failed": False}
    assert is_started_again("failed", retry_failed=True)
    assert not is_started_again("finished", retry_failed=True)


def test_how_a_run_ended():
    assert status_at_end(0, "finished", was_stopped=False) == "finished"
    assert status_at_end(-9, "running", was_stopped=False) == "killed"
    assert status_at_end(0, "stopped", was_stopped=False) == "stopped"
    assert status_at_end(1, "failed", was_stopped=True) == "stopped"
    assert status_at_end(None, "running", was_stopped=False) == "killed"


@pytest.mark.parametrize("text", ["{", "[]", '{"schema_version": 9}', '{"schema_version": 1}'])
def test_a_state_that_is_none_is_refused(tmp_path: Path, text: str):
    path = tmp_path / "state.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"state\.json: not the state of a sweep"):
        read_state(path)
    write_state(path, "x", {"a": RunState(status="killed", attempts=2)})
    assert read_state(path) == {"a": RunState(status="killed", attempts=2)}
