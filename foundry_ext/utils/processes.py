"""Environment variables, signals and cores of processes that start others."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_RANK_VARIABLES = {
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK"),
    *("MASTER_ADDR", "MASTER_PORT"),
}


def num_cores() -> int:
    """Return the number of cores that this process may use, which may be fewer than there are."""
    has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


def environment_without_rank() -> dict[str, str]:
    """Return this process's environment without what a launcher sets for its ranks.

    Another launcher must choose its own values: the previous run may still hold the old port.
    """
    return {name: value for name, value in os.environ.items() if name not in _RANK_VARIABLES}


@contextmanager
def handling_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Give SIGINT and SIGTERM to `handler` within this context."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
