"""Two ways to start a run of a sweep: a subprocess, or a fork of a process that has imported all.

Both give a run a session of its own, a log file and the run's lock (state.py).
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from foundry_ext.sweeps.state import claim, is_free
from foundry_ext.utils.processes import RANK_VARIABLES

THREADS = "OMP_NUM_THREADS"


@dataclass(frozen=True, kw_only=True)
class Job:
    command: tuple[str, ...]
    program: str
    arguments: tuple[str, ...]
    log: Path
    lock: Path
    environment: Mapping[str, str]
    """Beside the sweep's own."""


class Process(Protocol):
    pid: int | None

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        ...

    def interrupt(self) -> None: ...

    def kill(self) -> None: ...


class Launcher(Protocol):
    def start(self, job: Job) -> Process: ...

    def cancel(self) -> None:
        """Forgets what was asked for and has not begun."""
        ...

    def close(self) -> None: ...


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_each(parallel: int) -> dict[str, str]:
    """So that `parallel` runs on a CPU do not fight for its cores; what the user has set stays."""
    if THREADS in os.environ:
        return {}
    return {THREADS: str(max(1, num_cores() // parallel))}


def can_fork(command: tuple[str, ...], program: str) -> bool:
    """Whether the command is one process and nothing between it and the program."""
    return command[: command.index(program)] in (
        ("composer",),
        ("python",),
        ("/usr/bin/env", "python"),
    )


class SubprocessLauncher:
    """Starts the sweep's command as written, with `composer` and `python` of this environment."""

    def start(self, job: Job) -> Process:
        lock = claim(job.lock)
        if lock is None:
            raise BlockingIOError(f"{job.lock}: another process runs this one")
        environment = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES}
        with job.log.open("ab") as log:
            child = subprocess.Popen(
                resolve(job.command),
                env={**environment, **job.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[lock],
            )
        os.close(lock)  # the child's copy keeps it
        return _Subprocess(child)

    def cancel(self) -> None:
        pass

    def close(self) -> None:
        pass


def resolve(command: tuple[str, ...]) -> list[str]:
    """The command with `composer` and `python` of this environment, whether it is active or not."""
    ours = {"composer": [sys.executable, "-m", "composer.cli.launcher"], "python": [sys.executable]}
    start = 1 if command[0] == "/usr/bin/env" and len(command) > 1 else 0
    return [*command[:start], *ours.get(command[start], [command[start]]), *command[start + 1 :]]


class _Subprocess:
    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        self._child = child
        self.pid: int | None = child.pid

    def poll(self) -> int | None:
        return self._child.poll()

    def interrupt(self) -> None:
        self._child.send_signal(signal.SIGINT)  # the one signal that Composer's launcher knows

    def kill(self) -> None:
        _kill_group(self._child.pid)


class ForkLauncher:
    """Children of one foundry_ext.sweeps.fork_server, which is started with the first run.

    Only for one rank on a CPU. The server holds the sweep's lock too, so that no other sweep starts
    while it may still fork.
    """

    SERVER = ("-m", "foundry_ext.sweeps.fork_server")

    def __init__(self, *, parallel: int, log: Path, sweep_lock: int) -> None:
        self._threads = threads_each(parallel)
        self._log = log
        self._sweep_lock = sweep_lock
        self._server: subprocess.Popen[bytes] | None = None
        self._unnamed: list[_Fork] = []
        self._running: dict[int, _Fork] = {}
        self._pending = b""

    def start(self, job: Job) -> Process:
        server = self._server or self._start_server()
        assert server.stdin is not None
        content = {
            "program": job.program,
            "arguments": job.arguments,
            "log": str(job.log),
            "lock": str(job.lock),
            "environment": dict(job.environment),
        }
        process = _Fork(self)
        self._unnamed.append(process)
        try:
            server.stdin.write(json.dumps(content).encode() + b"\n")
            server.stdin.flush()
        except BrokenPipeError:
            self.receive()  # says what happened
        return process

    def _start_server(self) -> subprocess.Popen[bytes]:
        environment = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES}
        own = {"FOUNDRY_EXT_SWEEP_LOCK": str(self._sweep_lock)}
        with self._log.open("ab") as log:
            self._server = subprocess.Popen(
                [sys.executable, *self.SERVER],
                env={**environment, **self._threads, **own},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                pass_fds=[self._sweep_lock],
            )
        assert self._server.stdout is not None
        os.set_blocking(self._server.stdout.fileno(), False)
        return self._server

    def receive(self) -> None:
        """Takes what the server has said since.

        Raises:
            ChildProcessError: it is gone.
        """
        assert self._server is not None and self._server.stdout is not None
        try:
            received = os.read(self._server.stdout.fileno(), 65536)
        except BlockingIOError:
            return
        if not received:
            code = self._server.wait()
            raise ChildProcessError(
                f"the process that forks the runs ended with exit code {code}; see {self._log}"
            )
        *lines, self._pending = (self._pending + received).split(b"\n")
        for line in lines:
            reply = json.loads(line)
            if "code" in reply:
                self._running.pop(reply["pid"]).code = reply["code"]
            else:
                process = self._unnamed.pop(0)
                process.pid = reply["pid"]
                self._running[reply["pid"]] = process

    def cancel(self) -> None:
        if self._server is not None and self._unnamed and not self._running:
            self._server.kill()  # it imports still, which takes half a minute
            self.close()
            for process in self._unnamed:
                process.code = -signal.SIGKILL

    def close(self) -> None:
        if self._server is not None:
            assert self._server.stdin is not None and self._server.stdout is not None
            self._server.stdin.close()
            self._server.stdout.close()
            self._server.wait()
            self._server = None


class _Fork:
    def __init__(self, launcher: ForkLauncher) -> None:
        self._launcher = launcher
        self.pid: int | None = None
        self.code: int | None = None

    def poll(self) -> int | None:
        if self.code is None:
            self._launcher.receive()
        return self.code

    def interrupt(self) -> None:
        if self.code is None and self.pid is not None:
            os.kill(self.pid, signal.SIGINT)

    def kill(self) -> None:
        if self.code is None and self.pid is not None:
            _kill_group(self.pid)


def _kill_group(pid: int) -> None:
    """pid leads a session: its launcher's ranks and loaders go with it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


class Orphan:
    """A run that a killed sweep left behind; its lock or its arguments say that it still runs."""

    def __init__(self, job: Job, pid: int | None) -> None:
        self._job = job
        self.pid = pid

    @property
    def is_running(self) -> bool:
        return not is_free(self._job.lock) or bool(processes_of(self._job))

    def poll(self) -> int | None:
        """0 once it is gone: nobody but its parent could learn its exit code."""
        return None if self.is_running else 0

    def interrupt(self) -> None:
        self._signal(signal.SIGINT)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        # Its lock is held, so self.pid is still its own.
        pids = processes_of(self._job) or ([self.pid] if self.pid else [])
        for pid in pids if self.is_running else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def processes_of(job: Job) -> list[int]:
    """Processes in this folder with the run's very arguments: ranks whose launcher was killed.

    Only where there is a /proc; the lock alone speaks elsewhere.
    """
    wanted = [os.fsencode(argument) for argument in (job.program, *job.arguments)]
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (entry / "cmdline").read_bytes().split(b"\0")
            if arguments[-len(wanted) - 1 : -1] == wanted and (entry / "cwd").samefile("."):
                found.append(int(entry.name))
        except OSError:  # gone, or another user's
            continue
    return found
