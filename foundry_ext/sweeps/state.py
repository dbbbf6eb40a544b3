"""The state file and the locks of a sweep, and the status of its runs after a restart.

`outputs/sweeps/<name>/` holds state.json, which is replaced atomically at every change, and `lock`,
which the sweep holds while it runs. `locks/` has one file per run, whose lock the run itself holds
by inheriting the open file. That lock is free exactly when the run and its forks have ended,
whichever other process was killed and whatever has the run's pid now.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from foundry_ext.records.record import now
from foundry_ext.utils.atomic import write_text
from foundry_ext.utils.errors import UserError
from foundry_ext.utils.nested import get

STATE_VERSION = 1
# stopped: by Ctrl-C or SIGTERM to the sweep. killed: by a signal, or gone without a trace.
STATUSES = ("waiting", "running", "finished", "failed", "stopped", "killed")


@dataclass(kw_only=True)
class RunState:
    """The last known state of one run."""

    status: str = "waiting"
    attempts: int = 0
    pid: int | None = None
    exit_code: int | None = None
    """Negative if a signal ended it."""
    started: str | None = None
    seconds: float = 0.0
    """Duration of the last attempt."""
    error: str | None = None


def write_state(path: Path, sweep: str, runs: dict[str, RunState]) -> None:
    """Write the state file atomically: neither readers nor kill -9 can leave half a file."""
    content = {
        "schema_version": STATE_VERSION,
        "sweep": sweep,
        "updated": now(),
        "runs": {name: asdict(run) for name, run in runs.items()},
    }
    write_text(path, json.dumps(content, indent=1))


def read_state(path: Path) -> dict[str, RunState]:
    """Return the runs of the state file; none if there is no file yet."""
    if not path.exists():
        return {}
    way_out = "move it away to start from the runs' records"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema_version"] != STATE_VERSION:
            raise UserError(f"schema_version {content['schema_version']}, not {STATE_VERSION}")
        runs = {str(name): RunState(**run) for name, run in content["runs"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not the state of a sweep, {error!r}; {way_out}") from error
    for name, run in runs.items():
        if run.status not in STATUSES:
            raise UserError(f"{path}: run {name} has status {run.status!r}; {way_out}")
    return runs


def claim(path: Path) -> int | None:
    """Take the lock at `path`.

    Returns:
        A file descriptor that holds the lock until it and all its copies are closed; None if
        another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def is_free(path: Path) -> bool:
    lock = claim(path)
    if lock is not None:
        os.close(lock)
    return lock is not None


def read_run_record(path: Path) -> dict[str, Any]:
    """Return the run's record at `path`, or {} if it is missing or unreadable."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def wall_seconds(record: Mapping[str, Any]) -> float:
    """Return the run's duration so far from its record; 0 if the record lacks it."""
    return float(get(record, "time.wall_seconds") or 0.0)


def status_now(state: RunState, record_status: str | None) -> str:
    """Return the status of a run without a process, from its last state and its record.

    The record decides if they differ, because a killed sweep may have missed the run's end.
    """
    if record_status == "finished":
        return "finished"
    if state.status == "running" or record_status == "running":
        # A run that failed while no sweep was watching says so in its record.
        return "failed" if record_status == "failed" else "killed"
    if state.status == "waiting" and record_status in ("failed", "stopped"):
        return record_status
    return "waiting" if state.status == "finished" else state.status


def status_at_end(exit_code: int | None, record_status: str | None, *, was_stopped: bool) -> str:
    """Return the status of a run that just ended; exit_code is None if it was not our child."""
    if record_status == "finished":
        return "finished"
    if was_stopped or record_status == "stopped":
        return "stopped"
    if exit_code is None:
        return "failed" if record_status == "failed" else "killed"
    return "killed" if exit_code < 0 else "failed"


def is_started_again(status: str, *, retry_failed: bool) -> bool:
    """Return whether to start a run: failed ones only if `retry_failed`, finished ones never."""
    return status in ("waiting", "stopped", "killed") or (status == "failed" and retry_failed)
