"""Processes that find Composer and llm-foundry imported: a start costs 0.3 CPU seconds, not 20.

The standard library's fork server imports them once per pytest process. It only imports: a child
of a process in which torch has computed would hang.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).parents[2]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.system.rank_worker", "tests.system.kill_server"])


def start(
    target: Callable[..., Any], *arguments: Any, log: Path, folder: Path, **variables: str
) -> ForkServerProcess:
    """Start `target(*arguments)` in `folder`; the log is its standard output and error.

    It has the environment of this process, changed by `variables`.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    process = _context.Process(
        target=_call, args=(target, arguments, str(log), str(folder), environment)
    )
    with patch.dict(os.environ, PYTHONPATH=str(ROOT)):  # the first start is the server's too
        process.start()
    return process


def _call(target, arguments, log: str, folder: str, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    target(*arguments)


def wait(processes: Sequence[ForkServerProcess], seconds: float) -> list[int | None]:
    """Return the exit codes once all have ended well or one has not; the others are killed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        codes = [one.exitcode for one in processes]
        if not {*codes} <= {None, 0} or None not in codes:
            break
        time.sleep(0.02)
    codes = [one.exitcode for one in processes]
    for one in processes:
        one.kill()
        one.join()
    return codes
