"""How far a sweep is: its state file, its locks, and what to do with each run on a restart.

`outputs/sweeps/<name>/` holds state.json, written whole at every change; `lock`, which a sweep
holds while it runs; and a lock a run, which the run itself holds: a child inherits the open file,
so the lock is free exactly when that process and its forks are gone, whoever else was killed and
whatever has its pid now.
"""

import fcntl
import json
import os
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

STATE_VERSION = 1
# stopped: by Ctrl-C or SIGTERM to the sweep. killed: gone without a word, or by a signal.
STATUSES = ("waiting", "running", "finished", "failed", "stopped", "killed")


@dataclass(kw_only=True)
class RunState:
    """One run of the sweep, as last seen."""

    status: str = "waiting"
    attempts: int = 0
    pid: int | None = None
    exit_code: int | None = None
    """Negative: killed by that signal."""
    started: str | None = None
    seconds: float = 0.0
    """Of the last attempt."""
    error: str | None = None


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_state(path: Path, sweep: str, runs: dict[str, RunState]) -> None:
    """Whole or not at all: a reader, or a restart after kill -9, never finds half a file."""
    content = {
        "schema_version": STATE_VERSION,
        "sweep": sweep,
        "updated": now(),
        "runs": {name: asdict(run) for name, run in runs.items()},
    }
    partial = path.with_suffix(".partial")
    with partial.open("w") as stream:
        json.dump(content, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)


def read_state(path: Path) -> dict[str, RunState]:
    """The runs of the state file, or none where there is no file yet."""
    if not path.exists():
        return {}
    way_out = "move it away to start from the runs' records"
    try:
        content = json.loads(path.read_text())
        if content["schema_version"] != STATE_VERSION:
            raise ValueError(f"schema_version {content['schema_version']}, not {STATE_VERSION}")
        runs = {str(name): RunState(**run) for name, run in content["runs"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not the state of a sweep, {error!r}; {way_out}") from error
    for name, run in runs.items():
        if run.status not in STATUSES:
            raise ValueError(f"{path}: run {name} has status {run.status!r}; {way_out}")
    return runs


def claim(path: Path) -> int | None:
    """A file descriptor that holds the lock at `path` until it and its copies are closed.

    None where another process holds it.
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


def read_outcome(path: Path) -> dict[str, Any]:
    """The run's record at `path`, or {} where there is none that can be read."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def status_now(state: RunState, record_status: str | None) -> str:
    """The status of a run that no process runs, from what the sweep and its record last said.

    The record is believed first: a sweep killed at the wrong moment did not see the run's end.
    """
    if record_status == "finished":
        return "finished"
    if state.status == "running" or record_status == "running":
        # A run that failed while no sweep watched said so in its record.
        return "failed" if record_status == "failed" else "killed"
    if state.status == "waiting" and record_status in ("failed", "stopped"):
        return record_status
    return "waiting" if state.status == "finished" else state.status


def status_at_end(exit_code: int | None, record_status: str | None, *, was_stopped: bool) -> str:
    """The status of a run that just ended; exit_code None: of a process that was not our child."""
    if record_status == "finished":
        return "finished"
    if was_stopped or record_status == "stopped":
        return "stopped"
    if exit_code is None:
        return "failed" if record_status == "failed" else "killed"
    return "killed" if exit_code < 0 else "failed"


def is_started_again(status: str, *, retry_failed: bool) -> bool:
    """Killed and stopped runs always; failed ones on demand; finished ones never."""
    return status in ("waiting", "stopped", "killed") or (status == "failed" and retry_failed)
