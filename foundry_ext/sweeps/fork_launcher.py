"""A launcher that forks runs from a process that has already imported the trainer.

That process is a fork server of multiprocessing: one of our own, because the program that starts a
sweep may use the one that multiprocessing shares. Python 3.11 has no public names for what a sweep
promises:

- _forkserver_pid: Ctrl-C does not wait for the server's imports, and the end of the server is an
  error with its exit code.
- _stop: the next sweep in this process gets a server with its own log and number of threads.
- _forkserver_alive_fd: the server ends with a killed sweep, even while runs continue.
- atexit._run_exitfuncs: loggers flush at the end of a run, as in a process of its own.
"""

import atexit
import contextlib
import multiprocessing
import os
import runpy
import select
import signal
import sys
import types
from collections.abc import Iterator, Mapping
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from foundry_ext.sweeps.launchers import Job, Launcher, Process, hold_lock, threads_each
from foundry_ext.utils.processes import environment_without_rank

_CONTEXT = multiprocessing.get_context("forkserver")


class ForkLauncher(Launcher):
    """Starts runs as children of a fork server; for one rank on a CPU.

    The server starts with the first run, and forks once it has imported everything. A request to
    fork carries the locks of the run and of the sweep, so that both are held until the child has
    started, whoever is killed in between.
    """

    PRELOAD = "foundry_ext.sweeps.preload"

    def __init__(self, *, parallel: int, log: Path, sweep_lock: int) -> None:
        self._threads = threads_each(parallel)
        self._log = log
        self._sweep_lock = sweep_lock
        self._server: Any = forkserver.ForkServer()
        self._server.set_forkserver_preload([self.PRELOAD])
        self._server_output: int | None = None
        self._has_forked = False

    def start(self, job: Job) -> Process:
        if not self.has_server:
            self._start_server()
        return _Fork(self, job)

    @property
    def has_server(self) -> bool:
        return self._server_output is not None

    def _start_server(self) -> None:
        environment = {**environment_without_rank(), **self._threads}
        self._server_output, stdout = os.pipe()
        with self._log.open("ab") as log, _inheritance(environment, stdout, log.fileno()):
            self._server.ensure_running()
        os.close(stdout)
        # Else a request to a server that has died would start another one without all this.
        self._server.ensure_running = lambda: None

    def is_ready(self) -> bool:
        """Return whether the server has imported everything.

        Raises:
            ChildProcessError: The server has ended.
        """
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT  # _stop() waits for it again
        end = os.waitid(os.P_PID, self._server._forkserver_pid, options)
        if end is not None:
            code = end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
            raise ChildProcessError(
                f"the process that forks the runs ended with exit code {code}; see {self._log}"
            )
        assert self._server_output is not None
        return bool(select.select([self._server_output], [], [], 0)[0])

    def fork(self, job: Job) -> BaseProcess:
        self._has_forked = True
        # Connections, because multiprocessing passes on the descriptors of those.
        locks = Connection(hold_lock(job)), Connection(os.dup(self._sweep_lock))
        child = _CONTEXT.Process(target=_run, args=(job, *locks), name="MainProcess")
        main, shared = sys.modules["__main__"], forkserver.connect_to_new_process
        sys.modules["__main__"] = types.ModuleType("__main__")  # else the child imports this one
        # Else the child is asked of the shared server.
        forkserver.connect_to_new_process = self._server.connect_to_new_process
        try:
            child.start()
        except (EOFError, OSError) as error:
            raise ChildProcessError(
                f"the process that forks the runs ended; see {self._log}"
            ) from error
        finally:
            sys.modules["__main__"], forkserver.connect_to_new_process = main, shared
            for lock in locks:
                lock.close()  # the child's copies keep them
        return child

    def cancel(self) -> None:
        if self.has_server and not self._has_forked:
            os.kill(self._server._forkserver_pid, signal.SIGKILL)  # imports take half a minute
            self.close()

    def close(self) -> None:
        if self._server_output is not None:
            self._server._stop()
            os.close(self._server_output)
            self._server_output = None


class _Fork(Process):
    def __init__(self, launcher: ForkLauncher, job: Job) -> None:
        self._launcher = launcher
        self._job = job
        self._child: BaseProcess | None = None

    def poll(self) -> int | None:
        if not self._launcher.has_server:
            return -signal.SIGKILL  # cancelled
        code = self._child.exitcode if self._child else None
        # Also without a server, which gives a running child an exit code too.
        if self._launcher.is_ready() and self._child is None:
            self._child = self._launcher.fork(self._job)
            self.pid = self._child.pid
        return code


@contextlib.contextmanager
def _inheritance(environment: Mapping[str, str], stdout: int, stderr: int) -> Iterator[None]:
    """Give this environment and these streams to the processes started within."""
    previous = dict(os.environ)
    streams = {1: os.dup(1), 2: os.dup(2)}
    try:
        os.environ.clear()
        os.environ.update(environment)
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        yield
    finally:
        os.environ.clear()
        os.environ.update(previous)
        for number, stream in streams.items():
            os.dup2(stream, number)
            os.close(stream)


def _run(job: Job, lock: Connection, sweep_lock: Connection) -> None:
    """Run the program in the child as `python program arguments` would; the child holds `lock`."""
    os.setsid()  # a terminal's Ctrl-C is for the sweep, which passes it on
    os.set_inheritable(lock.fileno(), False)  # a process that outlives the run must not hold it
    sweep_lock.close()
    shared: Any = forkserver._forkserver  # which multiprocessing gives to every child
    os.close(shared._forkserver_alive_fd)  # else the server would outlive the sweep
    multiprocessing.set_start_method(None, force=True)  # else workers of the run use the server
    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    sys.stdout.reconfigure(line_buffering=True)  # pyright: ignore[reportAttributeAccessIssue]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.update(job.environment)
    sys.argv = [job.program, *job.arguments]
    sys.path[0] = str(Path(job.program).resolve().parent)
    try:
        runpy.run_path(job.program, run_name="__main__")
    except (Exception, KeyboardInterrupt) as error:
        sys.excepthook(type(error), error, error.__traceback__)  # W&B notes the failure there
        if isinstance(error, KeyboardInterrupt):  # Python ends by the signal, after its exit code
            atexit._run_exitfuncs()
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()  # which children of multiprocessing skip
