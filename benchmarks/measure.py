"""Clocks, ratios, memory and counts of a step.

On a CPU, time is the process's CPU time over all threads, so other load on the machine does not
count. On a GPU, it is wall time between two synchronisations.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

Run = Callable[[], object]
# Several on a GPU, because the next step's launches overlap with this one, as in training.
STEPS_A_SAMPLE = {"cuda": 5, "cpu": 1}


def seconds(run: Run, device: str, steps: int | None = None) -> float:
    """Return the seconds per step, over a sample of several steps."""
    steps = steps or STEPS_A_SAMPLE[device]
    clock = time.perf_counter if device == "cuda" else time.process_time
    synchronize(device)
    start = clock()
    for _ in range(steps):
        run()
    synchronize(device)
    return (clock() - start) / steps


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def alternate(runs: Mapping[str, Run], device: str, *, repeats: int) -> dict[str, list[float]]:
    """Return seconds of each, in rounds A B C A B C, so that other load affects all alike."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            found[name].append(seconds(run, device))
    return found


def pairwise(baseline: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Return how many times faster `other` is than the baseline of the same round.

    Example: baseline 10 20 and other 5 5 give the ratios 2 4 and the median 3.
    """
    return spread([a / b for a, b in zip(baseline, other, strict=True)])


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def device_peak_memory(run: Run) -> float:
    """Return the peak GiB of torch's allocator in a step, including weights and optimizer."""
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


def process_peak_memory(function: Callable[..., None], *arguments: Any) -> float:
    """Return the GiB by which a fresh process's resident memory rises in `function`, at its peak.

    This includes weights and optimizer, but not the interpreter and its libraries.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_rise_of_memory, function, arguments).result()


def _rise_of_memory(function: Callable[..., None], arguments: Sequence[Any]) -> float:
    before = _kibibytes("VmRSS")
    function(*arguments)
    # Not getrusage's maximum, because a child's starts at that of its parent.
    return (_kibibytes("VmHWM") - before) / 2**20


def _kibibytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def count_kernels(run: Run, device: str) -> int:
    """Count a step's CUDA kernels (no copies or fills); on a CPU, its outermost aten operators.

    Operators that compilation has fused on a CPU are not counted.
    """
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        run()
        synchronize(device)
    events = profiler.events() or []
    if device == "cuda":
        return sum(is_kernel(event) for event in events)
    return sum(is_aten(event) and not is_aten(event.cpu_parent) for event in events)


def is_aten(event: Any) -> bool:
    return event is not None and event.name.startswith("aten::")


def is_kernel(event: Any) -> bool:
    """Return whether a device event is a kernel: not a copy, a fill or a mark of the profiler."""
    if event.device_type != DeviceType.CUDA or getattr(event, "is_user_annotation", False):
        return False
    return not event.name.startswith(("Memcpy", "Memset", "ProfilerStep", "Optimizer.", "##"))
