"""Variants and methods measured side by side on one workload."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.measure import (
    alternate,
    count_kernels,
    device_peak_memory,
    pairwise,
    process_peak_memory,
    seconds,
    spread,
    synchronize,
)
from benchmarks.variants import VARIANTS, Absent, Bench, Setup, Step, is_compiled, make_batches
from benchmarks.workloads import Batch, Workload
from foundry_ext.models.flops import adapter_parameters, peak_flops, training_flops

BASELINE = "hf_padded"
WARM_UP = {"cuda": 4, "cpu": 1}  # steps: allocations, choice of kernels, compilation


@dataclass(frozen=True, kw_only=True)
class Options:
    repeats: int = 5
    memory: bool = False
    """Measure peak memory on a CPU too, where each variant then runs again in its own process."""
    kernels: bool = True
    workers: int | None = None
    """Workers of a loader that makes each step's batches again; None for no loader."""


Key = tuple[str, str]  # method, variant


def compare(
    setups: Mapping[str, Setup],
    workload: Workload,
    names: Sequence[str],
    options: Options,
    sizes: Mapping[str, int] | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure all variants on a workload: {"workload": {...}, "variants": [{...}, ...]}.

    All methods and variants take turns, so that every ratio is of times from the same round.

    Args:
        setups: by method; they differ only by method.
        names: of `VARIANTS`.
        sizes: rows of a padded variant's microbatch by variant; searched for if missing.
    """
    steps: dict[Key, Step] = {}
    rows: dict[Key, dict[str, Any]] = {}
    for method, setup in setups.items():
        bench = Bench(setup)
        for name in names:
            key = (method, name)
            rows[key] = {"method": method, "variant": name, "title": VARIANTS[name].title}
            try:
                size = (sizes or {}).get(name) or best_rows(bench, name, workload)
                step = bench.step(name, workload, size)
                rows[key] |= {"rows": size, **_warm_up(step, name, options)}
                steps[key] = step
            except Absent as reason:
                rows[key]["absent"] = str(reason)
            except torch.OutOfMemoryError:
                rows[key]["absent"] = "out of memory"
                bench.optimizer.zero_grad(set_to_none=True)
            say(f"  {method}, {VARIANTS[name].title}: {rows[key].get('absent', 'ready')}")
    device = next(iter(setups.values())).device
    found = alternate(steps, device, repeats=options.repeats)  # pyright: ignore[reportArgumentType]
    for key, step in steps.items():
        setup = setups[key[0]]
        rows[key] |= _rates(step, found[key], workload, setup)  # pyright: ignore[reportArgumentType]
        rows[key] |= _costs(key[1], step, workload, setup, options, rows[key]["rows"])
    _add_ratios(rows, found)  # pyright: ignore[reportArgumentType]
    return {"workload": _describe(workload), "variants": list(rows.values())}


def _describe(workload: Workload) -> dict[str, Any]:
    num_labels = workload.num_loss_tokens
    return {
        "name": workload.name,
        "documents": len(workload.documents),
        "tokens": workload.num_tokens,
        "loss_tokens": num_labels,
        "labelled": num_labels / (workload.num_tokens - len(workload.documents)),
        "sum_squared_lengths": workload.sum_squared_lengths,
        "pack_tokens": workload.pack_tokens,
    }


def best_rows(bench: Bench, name: str, workload: Workload) -> int | None:
    """Return the rows of the fastest padded microbatch that fits in memory; None if not padded."""
    sizes = workload.microbatches
    if VARIANTS[name].batches != "padded":
        return None
    if len(sizes) == 1 or VARIANTS[name].compiled:
        # Compilation takes minutes, so use the best size of the same model uncompiled.
        return sizes[0] if len(sizes) == 1 else best_rows(bench, BASELINE, workload)
    times: dict[int, float] = {}
    for size in sizes:
        try:
            step = bench.step(name, workload, size)
            step()
            times[size] = seconds(step, bench.setup.device, steps=1)
        except torch.OutOfMemoryError:
            bench.optimizer.zero_grad(set_to_none=True)
            break
        if times[size] > 1.3 * min(times.values()):
            break  # past the best size, larger microbatches only add padding
    if not times:
        raise Absent(f"out of memory with {sizes[0]} rows")
    return min(times, key=lambda size: times[size])


def _warm_up(step: Step, name: str, options: Options) -> dict[str, Any]:
    """Warm up; return {"loss": ..., "kernels" or "operators": ...}, both of the last step."""
    device, losses = step.setup.device, []
    compiled = is_compiled(VARIANTS[name], step.setup)
    for _ in range(WARM_UP[device] - 1 + (compiled or not options.kernels)):
        losses.append(step())
    counts = {}
    if options.kernels:
        key = "kernels" if device == "cuda" else "operators"
        counts[key] = count_kernels(lambda: losses.append(step()), device)
    return {"loss": losses[-1].item(), **counts}


def _rates(
    step: Step, samples: Sequence[float], workload: Workload, setup: Setup
) -> dict[str, Any]:
    num_tokens, time = workload.num_tokens, spread(samples)
    rates: dict[str, Any] = {
        "microbatches": len(step.batches),
        "slots": step.num_computed_tokens,
        "fill": num_tokens / step.num_computed_tokens,
        "seconds": list(samples),
        "tokens_per_second": num_tokens / time["median"],
        "tokens_per_second_least": num_tokens / time["most"],
        "tokens_per_second_most": num_tokens / time["least"],
        "loss_tokens_per_second": workload.num_loss_tokens / time["median"],
        "flops": step_flops(workload, step),
    }
    peak = peak_flops(torch.cuda.get_device_name()) if setup.device == "cuda" else None
    if peak is not None:
        rates["mfu"] = rates["flops"] / time["median"] / peak
    return rates


def step_flops(workload: Workload, step: Step) -> float:
    """Return the FLOPs that every variant must compute: no padding, no recomputation."""
    return training_flops(
        step.setup.config(),
        num_tokens=workload.num_tokens,
        num_loss_tokens=workload.num_loss_tokens,
        sum_squared_lengths=workload.sum_squared_lengths,
        frozen_base=step.setup.method != "full",
        adapter_parameters=adapter_parameters(step.model),
    )


def _costs(
    name: str, step: Step, workload: Workload, setup: Setup, options: Options, rows: int | None
) -> dict[str, Any]:
    costs: dict[str, Any] = {}
    if setup.device == "cuda":
        costs["peak_memory_gib"] = device_peak_memory(step)
    elif options.memory:
        costs["peak_memory_gib"] = process_peak_memory(_one_step, setup, workload, name, rows)
    if options.workers is not None:
        costs["data_wait"] = data_wait(name, step, workload, setup, options.workers, rows)
    return costs


def _one_step(setup: Setup, workload: Workload, name: str, rows: int | None) -> None:
    Bench(setup).step(name, workload, rows)()


class _Batches(Dataset):
    """A step's batches, made again each time they are read."""

    def __init__(self, *arguments: Any, length: int):
        self.arguments, self.length = arguments, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> list[Batch]:
        return make_batches(*self.arguments)


def data_wait(
    name: str, step: Step, workload: Workload, setup: Setup, workers: int, rows: int | None
) -> float:
    """Return the share of wall time, 0 to 1, that steps after the first wait for the loader."""
    count = 1 + (20 if setup.device == "cuda" else 2)
    dataset = _Batches(name, workload, setup, rows, length=count)
    cuda = setup.device == "cuda"
    loader = DataLoader(dataset, batch_size=None, num_workers=workers, pin_memory=cuda)
    batches, waited, start = iter(loader), 0.0, 0.0
    for index in range(count):
        asked = perf_counter()
        batch = next(batches)
        if index > 0:
            waited += perf_counter() - asked
        step.load(batch)
        step()
        synchronize(setup.device)
        start = start or perf_counter()  # after the first
    return waited / (perf_counter() - start)


def _add_ratios(rows: Mapping[Key, dict[str, Any]], samples: Mapping[Key, Sequence[float]]) -> None:
    """Add each row's speed-up over other rows.

    With the same method: over the baseline and over the fastest variant of Hugging Face. With the
    same variant: over full fine-tuning.
    """
    for (method, name), row in rows.items():
        if (method, name) not in samples:
            continue
        theirs = [key for key in samples if key[0] == method and not VARIANTS[key[1]].ours]
        fastest = min(theirs, key=lambda key: spread(samples[key])["median"], default=None)
        others = {
            "over_hf_padded": (method, BASELINE),
            "over_fastest_hf": fastest,
            "over_full": ("full", name),
        }
        for label, other in others.items():
            if other in samples and other != (method, name):
                row[label] = pairwise(samples[other], samples[method, name])
