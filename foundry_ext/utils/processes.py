"""Processes: numbers, cores, signals, and the environment of those that are started."""

import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import FrameType

import xxhash

_RANK_VARIABLES = {
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK"),
    *("MASTER_ADDR", "MASTER_PORT"),
}


def num_cores() -> int:
    """Return the number of cores that this process may use, which may be fewer than there are."""
    has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


def is_running(process: int) -> bool:
    """Return whether this machine has a process of this number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


@cache
def machine_name() -> str:
    """Return a name for what process numbers are unique in: a container, until the next boot."""
    parts = [socket.gethostname()]
    with suppress(OSError):  # not Linux
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8"))
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    return xxhash.xxh3_64(" ".join(parts).encode()).hexdigest()


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
