"""Growth of the cost per token with the size of packs, the model or documents.

Run by `step_time.py --scale`. All points of an axis take turns in one process. A step is a step of
`ours` on full packs.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.comparison import step_flops
from benchmarks.machine import as_line
from benchmarks.measure import alternate, spread
from benchmarks.report import new_report, write_json
from benchmarks.variants import Bench, Setup, Step
from benchmarks.workloads import LONGEST, Workload, make_documents, packed_workload
from foundry_ext.comparison.report.figures import FAINT, new_figure
from foundry_ext.models.flops import peak_flops

# Axis -> device -> points. A CPU computes some hundred tokens per second.
AXES: dict[str, dict[str, tuple[Any, ...]]] = {
    "pack_tokens": {
        "cpu": (512, 1024, 2048, 4096),
        "cuda": (2048, 4096, 8192, 16384, 32768, 65536),
    },
    "model": {
        "cpu": ("smollm2-135m", "smollm2-360m", "smollm2-1.7b"),
        "cuda": ("smollm2-135m", "smollm2-360m", "smollm2-1.7b"),
    },
    "document_length": {
        "cpu": (32, 128, 512, 2048),
        "cuda": (64, 256, 1024, 2048, 4096, 8192),
    },
}
TITLES = {
    "pack_tokens": "tokens per pack",
    "model": "parameters, millions",
    "document_length": "tokens per document",
}
PACK_TOKENS = {"cpu": {"model": 512, "document_length": 2048}, "cuda": {}}
WARM_UP = {"cpu": 1, "cuda": 4}
RESULTS = Path(__file__).parent / "results"

SetupOf = Callable[[argparse.Namespace, str, str], Setup]


def run(options: argparse.Namespace, setup_of: SetupOf) -> dict[str, Any]:
    """Measure an axis, print a table, and write JSON and a picture beside it."""
    axis, device = options.scale, options.device
    points = points_of(axis, device, options.methods[0])
    report = new_report(device, {"axis": axis, "method": options.methods[0]})
    print(as_line(report["machine"]), flush=True)
    steps, workloads, sizes = {}, {}, {}
    benches: dict[str, Bench] = {}
    for point in points:
        model = point if axis == "model" else options.models[0]
        if model not in benches:
            benches[model] = Bench(setup_of(options, model, options.methods[0]))
        bench = benches[model]
        workload = _workload(axis, point, options, bench.setup.config().vocab_size)
        try:
            step = bench.step("ours", workload)
            for _ in range(WARM_UP[device]):
                step()
        except torch.OutOfMemoryError:
            print(f"{axis} {point}: out of memory", file=sys.stderr)
            continue
        steps[point], workloads[point] = step, workload
        sizes[point] = sum(p.numel() for p in bench.source.parameters())
    samples = alternate(steps, device, repeats=options.repeats)
    report["results"] = [
        {
            "point": sizes[point] / 1e6 if axis == "model" else point,
            "name": str(point),
            **_cost(steps[point], samples[point], workloads[point]),
        }
        for point in steps
    ]
    path = options.json or RESULTS / f"scale_{axis}_{device}.json"
    write_json(report, path)
    print(table(report))
    draw(report, path.with_suffix(".png"))
    return report


def points_of(axis: str, device: str, method: str) -> tuple[Any, ...]:
    """Return the axis's points, without the 1.7B if Adam's moments would fill a CPU's memory."""
    points = AXES[axis][device]
    if (axis, device, method) == ("model", "cpu", "full"):
        points = tuple(point for point in points if point != "smollm2-1.7b")
        print("smollm2-1.7b is left out; on a CPU use --methods lora for it", file=sys.stderr)
    return points


def _workload(axis: str, point: Any, options: argparse.Namespace, vocabulary: int) -> Workload:
    capacity = PACK_TOKENS[options.device].get(axis, options.pack_tokens)
    if axis != "document_length":
        return packed_workload(
            "a",
            vocabulary=vocabulary,
            labelled=1.0,
            pack_tokens=point if axis == "pack_tokens" else capacity,
            num_packs=1,
            microbatches=(1,),
        )
    documents = make_documents([point] * (capacity // point), vocabulary=vocabulary, labelled=1.0)
    return Workload(
        name=f"documents of {point}",
        documents=documents,
        pack_tokens=capacity,
        max_seq_len=max(point, LONGEST),
        microbatches=(1,),
    )


def _cost(step: Step, samples: list[float], workload: Workload) -> dict[str, Any]:
    num_tokens = workload.num_tokens
    flops = step_flops(workload, step)
    time = spread(samples)
    cost: dict[str, Any] = {
        "tokens": num_tokens,
        "microseconds_per_token": {k: 1e6 * v / num_tokens for k, v in time.items()},
        "flops_per_token": flops / num_tokens,
        "flops_per_second": flops / time["median"],
    }
    if step.setup.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        cost["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        peak = peak_flops(torch.cuda.get_device_name())
        if peak is not None:
            cost["mfu"] = cost["flops_per_second"] / peak
    return cost


def table(report: dict[str, Any]) -> str:
    axis = report["settings"]["axis"]
    lines = [f"| {axis} | us per token (least-most) | MFLOP per token | GFLOP/s | MFU | peak GiB |"]
    lines += ["|" + "---|" * 6]
    for row in report["results"]:
        time = row["microseconds_per_token"]
        mfu, memory = row.get("mfu"), row.get("peak_memory_gib")
        cells = [
            row["name"],
            f"{time['median']:,.1f} ({time['least']:,.1f}-{time['most']:,.1f})",
            f"{row['flops_per_token'] / 1e6:,.0f}",
            f"{row['flops_per_second'] / 1e9:,.0f}",
            "" if mfu is None else f"{100 * mfu:.1f} %",
            "" if memory is None else f"{memory:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw the time per token with its spread, and the first point's time scaled by FLOPs."""
    axis, results = report["settings"]["axis"], report["results"]
    x = [row["point"] for row in results]
    times = [row["microseconds_per_token"] for row in results]
    median = [time["median"] for time in times]
    first = median[0] / results[0]["flops_per_token"]
    with new_figure(path.parent, path.stem, (6.0, 3.6)) as axes:
        error = [
            [time["median"] - time["least"] for time in times],
            [time["most"] - time["median"] for time in times],
        ]
        axes.errorbar(x, median, yerr=error, marker="o", color="#0072B2", label="measured")
        by_flops = [first * row["flops_per_token"] for row in results]
        axes.plot(x, by_flops, color=FAINT, linestyle="--", label="in proportion to FLOPs")
        axes.set_xscale("log", base=10 if axis == "model" else 2)
        axes.set_xticks(x, [f"{value:,.0f}" for value in x])
        if axis == "model":
            axes.set_yscale("log")
            axes.set_yticks(median, [f"{value:,.0f}" for value in median])
        else:
            axes.set_ylim(bottom=0)
        axes.minorticks_off()
        axes.set_xlabel(TITLES[axis])
        axes.set_ylabel("microseconds per token")
        machine = report["machine"]
        axes.set_title(f"{machine['device']}, torch {machine['torch']}")
        axes.legend()
