"""Profile of an optimizer step, in ten lines and a picture: ours and Hugging Face's padded.

    python benchmarks/profile_step.py

torch.profiler times operators. They are grouped by their names, their callers, and whether they
touch the vocabulary. On a GPU, the time of the kernels that they launch counts. On a CPU, the
profiler measures only wall time, including its own, so its shares are applied to the step's CPU
time. Run this on an idle machine.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1]))  # run from a checkout, installed or not

from benchmarks.comparison import WARM_UP, step_flops
from benchmarks.machine import as_line
from benchmarks.measure import is_kernel, seconds, synchronize
from benchmarks.report import new_report, write_json
from benchmarks.step_time import DEFAULTS, add_shipped, setup_of
from benchmarks.variants import METHODS, VARIANTS, Absent, Bench, Step
from benchmarks.workloads import packed_workload
from foundry_ext.comparison.report.figures import new_figure

RESULTS = Path(__file__).parent / "results"
GROUPS: tuple[str, ...] = (
    *("trunk products", "attention", "norm, rotary, SwiGLU, casts", "head and loss"),
    *("optimizer", "other"),
)
COLOURS = ("#0072B2", "#D55E00", "#56B4E9", "#009E73", "#AA4499", "#8a8a8a")
# Parts of the names of an operator or its callers; the first group that matches is used.
ABOVE = (
    ("optimizer", ("Optimizer.step", "Optimizer.zero_grad")),
    ("other", ("embedding",)),
    ("attention", ("attention", "Attention", "flash", "varlen")),
    ("head and loss", ("CrossEntropy", "cross_entropy", "nll_loss", "NllLoss", "log_softmax")),
)
OWN = (
    ("trunk products", ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "mkldnn", "mkl::")),
    # On a CPU, fused operators count as the compiled graph's own time.
    ("norm, rotary, SwiGLU, casts", ("aten::", "triton_", "CompiledFxGraph", "CompiledFunction")),
)
# For a GPU's kernels that the profiler assigns to no operator, as in a CUDA graph.
KERNELS = (
    ("attention", ("flash", "fmha", "attention", "varlen")),
    ("head and loss", ("cross_entropy", "log_softmax", "nll")),
    ("trunk products", ("gemm", "cutlass", "nvjet", "xmma", "cublas", "splitK")),
    ("optimizer", ("adam", "multi_tensor", "lion")),
    ("norm, rotary, SwiGLU, casts", ("triton", "elementwise", "vectorized", "reduce", "copy")),
)


def group_times(run: Any, device: str, vocabulary: int) -> dict[str, float]:
    """Return a step's seconds by group, of operators on a CPU and of kernels on a GPU."""
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, record_shapes=True) as profiler:
        run()
        synchronize(device)
    events = list(profiler.events() or [])
    times = dict.fromkeys(GROUPS, 0.0)
    if device == "cpu":
        for event in events:
            times[group_of(event, vocabulary)] += event.self_cpu_time_total / 1e6
        return times
    for group, _name, time in launched(events, vocabulary):
        times[group] += time
    for name, time in not_launched(events).items():
        times[by_name(name, KERNELS)] += time
    return times


def launched(events: list[Any], vocabulary: int) -> Iterator[tuple[str, str, float]]:
    """Yield (group, name, seconds) of each kernel that an operator launched."""
    for event in events:
        for kernel in getattr(event, "kernels", []):
            if not kernel.name.startswith(("Memcpy", "Memset")):
                yield group_of(event, vocabulary), kernel.name, kernel.duration / 1e6


def not_launched(events: list[Any]) -> dict[str, float]:
    """Return the seconds by name of all other kernels."""
    times: defaultdict[str, float] = defaultdict(float)
    for event in events:
        if is_kernel(event):
            times[event.name] += event.device_time_total / 1e6
    for _group, name, time in launched(events, 0):
        times[name] -= time
    return {name: time for name, time in times.items() if time > 1e-9}


def group_of(event: Any, vocabulary: int) -> str:
    """Return an operator's group, by its callers, then its shapes, then its own name."""
    chain = [event]
    while chain[-1].cpu_parent is not None:
        chain.append(chain[-1].cpu_parent)
    for group, parts in ABOVE:
        if any(part in above.name for above in chain for part in parts):
            return group
    if any(touches(above, vocabulary) for above in chain if above.name.startswith("aten::")):
        return "head and loss"
    return by_name(event.name, OWN)


def touches(event: Any, vocabulary: int) -> bool:
    return any(vocabulary in shape for shape in event.input_shapes or [] if shape)


def by_name(name: str, table: tuple[tuple[str, tuple[str, ...]], ...]) -> str:
    return next((group for group, parts in table if any(p in name for p in parts)), "other")


def product_rate(device: str, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large square product, the most that trunk products could reach."""
    size = 8192 if device == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    torch.mm(a, b)
    return 2 * size**3 / min(seconds(lambda: torch.mm(a, b), device) for _ in range(3))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    setup = setup_of(options, options.model, options.method)
    vocabulary = setup.config().vocab_size
    workload = packed_workload(
        options.lengths,
        vocabulary=vocabulary,
        labelled=1.0,
        pack_tokens=options.pack_tokens,
        num_packs=options.packs,
        microbatches=(options.rows,),
    )
    settings = {"device": options.device, "model": options.model, "method": options.method}
    report = new_report(options.device, {**settings, "precision": options.precision})
    bench = Bench(setup)
    for name in options.variants:
        try:
            step = bench.step(name, workload)
        except Absent as reason:
            print(f"{VARIANTS[name].title}: {reason}", file=sys.stderr)
            continue
        for _ in range(WARM_UP[options.device]):
            step()
        report["results"].append(_row(name, step, workload, vocabulary))
    dtype = torch.float32 if options.precision == "fp32" else torch.bfloat16
    report["product_flops_per_second"] = product_rate(options.device, dtype)
    return report


def _row(name: str, step: Step, workload: Any, vocabulary: int) -> dict[str, Any]:
    device = step.setup.device
    time, groups = seconds(step, device), group_times(step, device, vocabulary)
    profiled = sum(groups.values())
    if device == "cpu":
        groups = {group: time * value / profiled for group, value in groups.items()}
    return {
        "variant": name,
        "title": VARIANTS[name].title,
        "tokens": workload.num_tokens,
        "slots": step.num_computed_tokens,
        "seconds": time,
        "profiled_seconds": profiled,
        "groups": groups,
        "flops": step_flops(workload, step),
    }


def text(report: dict[str, Any]) -> str:
    """Return ten lines: the machine, the variants, one line per group, the step, the FLOP/s."""
    rows, unit = report["results"], "ms per step"
    heads = "  ".join(f"{row['title']:>24}" for row in rows)
    lines = [as_line(report["machine"]), f"{unit:<30}{heads}"]
    for group in GROUPS:
        cells = []
        for row in rows:
            share = row["groups"][group] / sum(row["groups"].values())
            cells.append(f"{1000 * row['groups'][group]:>15,.1f} ({100 * share:>4.1f} %)".rjust(24))
        lines.append(f"{group:<30}" + "  ".join(cells))
    whole = [f"{1000 * row['seconds']:,.1f}".rjust(24) for row in rows]
    lines.append(f"{'the step, without profiler':<30}" + "  ".join(whole))
    last, rate = rows[-1], report["product_flops_per_second"]
    lines.append(
        f"{last['title']}: {last['flops'] / last['seconds'] / 1e9:,.0f} GFLOP/s overall;"
        f" {rate / 1e9:,.0f} for a large product alone; profiled seconds are"
        f" {last['profiled_seconds'] / last['seconds']:.2f} of the step's time."
    )
    return "\n".join(lines)


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw one stacked bar per variant, in microseconds per real token."""
    rows = report["results"][::-1]
    with new_figure(path.parent, path.stem, (8.0, 0.62 * len(rows) + 1.5)) as axes:
        left = [0.0] * len(rows)
        for group, colour in zip(GROUPS, COLOURS, strict=True):
            widths = [1e6 * row["groups"][group] / row["tokens"] for row in rows]
            axes.barh(range(len(rows)), widths, left=left, color=colour, label=group, height=0.55)
            for place, (start, width) in enumerate(zip(left, widths, strict=True)):
                if width > 0.06 * max(sum(r["groups"].values()) / r["tokens"] for r in rows) * 1e6:
                    axes.annotate(
                        f"{width:,.0f}",
                        (start + width / 2, place),
                        ha="center",
                        va="center",
                        color="white",
                        fontsize=8,
                    )
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axes.set_yticks(range(len(rows)), [row["title"] for row in rows])
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        clock = "CPU time" if report["settings"]["device"] == "cpu" else "kernel time"
        axes.set_xlabel(f"{clock} per real token, microseconds")
        machine, settings = report["machine"], report["settings"]
        axes.set_title(
            f"{settings['model']}, {settings['method']}, {settings['precision']};"
            f" {machine['device']}, torch {machine['torch']}"
        )
        axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.32), ncols=3)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--model", default="smollm2-135m", help="a shipped shape")
    add("--method", default="full", choices=sorted(METHODS))
    add("--variants", type=lambda value: value.split(","), default=["hf_padded", "ours"])
    add("--lengths", default="a", choices=("a", "b", "c"))
    add("--pack-tokens", type=int)
    add("--packs", type=int, help="per step")
    add("--rows", type=int, default=4, help="per padded microbatch")
    add_shipped(made)
    add("--json", type=Path, help="file to write; the picture is written beside it")
    add("--draw", type=Path, help="only draw the picture, from this JSON")
    options = made.parse_args(arguments)
    for key in ("precision", "compile", "pack_tokens", "packs"):
        if getattr(options, key) is None:
            setattr(options, key, DEFAULTS[options.device][key])
    return options


def main() -> None:
    options = parse()
    if options.draw:
        draw(json.loads(options.draw.read_text(encoding="utf-8")), options.draw.with_suffix(""))
        return
    path = options.json or RESULTS / f"profile_{options.device}.json"
    report = measure(options)
    write_json(report, path)
    draw(report, path.with_suffix(""))
    print(text(report))


if __name__ == "__main__":
    main()
