"""Clocks, memory and tables of benchmarks/data*.py."""

import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

REPEATS = 5


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of all children it has waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def best_of(functions: dict[str, Callable[[], Any]], repeats: int = REPEATS) -> dict[str, float]:
    """Return the CPU seconds of each function, the least of several rounds A B A B."""
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(repeats):
        for name, function in functions.items():
            start = cpu_seconds()
            function()
            best[name] = min(best[name], cpu_seconds() - start)
    return best


Table = tuple[str, list[str], Iterator[list[str]]]  # title, header, lines as they are measured


def print_table(table: Table) -> None:
    title, header, lines = table
    print(f"\n## {title}\n\n| {' | '.join(header)} |\n{'|---' * len(header)}|", flush=True)
    for line in lines:
        print(f"| {' | '.join(line)} |", flush=True)


def memory() -> dict[str, int]:
    """Return MiB in use: `anon` (the process's own), `file` (mapped files), `peak` (of both)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    found = dict(line.split(":") for line in status if line.startswith(("Rss", "VmHWM")))
    names = {"anon": "RssAnon", "file": "RssFile", "peak": "VmHWM"}
    return {name: int(found[key].split()[0]) // 1024 for name, key in names.items()}
