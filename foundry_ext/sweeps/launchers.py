"""The interface of launchers, the launcher of subprocesses, and runs left by a killed sweep.

A launcher gives a run a session of its own, a log file and the run's lock (state.py).
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from foundry_ext.sweeps.state import claim, is_free
from foundry_ext.utils.processes import environment_without_rank, num_cores

THREADS = "OMP_NUM_THREADS"
_LONGEST_SOCKET = 104  # bytes of a socket's path, on macOS; 108 on Linux


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run for a launcher to start."""

    command: tuple[str, ...]
    program: str
    arguments: tuple[str, ...]
    log: Path
    lock: Path
    environment: Mapping[str, str]
    """Variables added to those of the sweep."""


class Process:
    """A run that was started, as the leader of a session."""

    pid: int | None = None
    """None until there is a process."""

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while the run has not ended."""
        raise NotImplementedError

    def interrupt(self) -> None:
        """Send SIGINT, at which Composer's launcher stops its ranks and waits for them."""
        self._signal(os.kill, signal.SIGINT)

    def kill(self) -> None:
        """Kill the process together with its ranks and data loaders."""
        self._signal(os.killpg, signal.SIGKILL)

    def _signal(self, send: Callable[[int, int], None], number: int) -> None:
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                send(self.pid, number)


class Launcher:
    """A way to start runs."""

    def start(self, job: Job) -> Process:
        raise NotImplementedError

    def cancel(self) -> None:
        """Forget the jobs that have no process yet."""

    def close(self) -> None:
        """Stop the helpers of the launcher, but not the runs."""


def threads_each(parallel: int) -> dict[str, str]:
    """Return variables that share the cores among `parallel` runs, unless the user has set them."""
    if THREADS in os.environ:
        return {}
    return {THREADS: str(max(1, num_cores() // parallel))}


def can_fork(command: tuple[str, ...], program: str) -> bool:
    """Return whether the command is a single process that runs the program directly.

    The fork server also needs a socket in the temporary folder, whose path must be short.
    """
    single = (("composer",), ("python",), ("/usr/bin/env", "python"))
    socket = Path(tempfile.gettempdir(), "pymp-xxxxxxxx", "listener-xxxxxxxx")
    return command[: command.index(program)] in single and len(bytes(socket)) < _LONGEST_SOCKET


def hold_lock(job: Job) -> int:
    """Return a file descriptor that holds the lock of the run."""
    lock = claim(job.lock)
    if lock is None:
        raise BlockingIOError(f"{job.lock}: another process runs this one")
    return lock


class SubprocessLauncher(Launcher):
    """Starts runs by the sweep's command, with `composer` and `python` of this environment."""

    def start(self, job: Job) -> Process:
        lock = hold_lock(job)
        with job.log.open("ab") as log:
            child = subprocess.Popen(
                resolve(job.command),
                env={**environment_without_rank(), **job.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[lock],
            )
        os.close(lock)  # the child's copy keeps it
        return _Subprocess(child)


def resolve(command: tuple[str, ...]) -> list[str]:
    """Return the command with `composer` and `python` of this environment, even if inactive."""
    ours = {"composer": [sys.executable, "-m", "composer.cli.launcher"], "python": [sys.executable]}
    start = 1 if command[0] == "/usr/bin/env" and len(command) > 1 else 0
    return [*command[:start], *ours.get(command[start], [command[start]]), *command[start + 1 :]]


class _Subprocess(Process):
    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        self.pid = child.pid
        self.poll = child.poll


class Orphan(Process):
    """A run left behind by a killed sweep, recognised by its lock or its arguments."""

    def __init__(self, job: Job, pid: int | None) -> None:
        self._job = job
        self.pid = pid

    @property
    def is_running(self) -> bool:
        return not is_free(self._job.lock) or bool(processes_of(self._job))

    def poll(self) -> int | None:
        """Return 0 after its end: only its parent could have learned the exit code."""
        return None if self.is_running else 0

    def _signal(self, send: Callable[[int, int], None], number: int) -> None:
        # Its lock is held, so no other process has its pid by now.
        pids = processes_of(self._job) or ([self.pid] if self.pid else [])
        for pid in pids if self.is_running else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def processes_of(job: Job) -> list[int]:
    """Return processes in this folder with the run's arguments: ranks whose launcher was killed.

    The result is empty on systems without /proc.
    """
    wanted = [os.fsencode(argument) for argument in (job.program, *job.arguments)]
    pids = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (entry / "cmdline").read_bytes().split(b"\0")
            if arguments[-len(wanted) - 1 : -1] == wanted and (entry / "cwd").samefile("."):
                pids.append(int(entry.name))
        except OSError:  # gone, or another user's
            continue
    return pids
