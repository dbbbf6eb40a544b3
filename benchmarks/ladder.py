"""Speed-up of each step from padding to packing, as one picture.

    python benchmarks/ladder.py               # measures, writes results/ladder_<device>.json, draws
    python benchmarks/ladder.py --draw FILE   # draws again from the JSON of a run

The rungs take turns on the same documents in one process: Hugging Face padded with SDPA; unpadded
(our model, given the same padded batch); unpadded with a larger microbatch; packed; packed and
compiled. Complete optimizer steps are timed, and only real tokens count.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # run from a checkout, installed or not

from benchmarks.comparison import BASELINE, Options, best_rows, compare
from benchmarks.machine import as_line
from benchmarks.report import markdown, new_report, write_json
from benchmarks.step_time import DEFAULTS, add_shipped, setup_of
from benchmarks.variants import Bench
from benchmarks.workloads import packed_workload
from foundry_ext.comparison.report.figures import FAINT, new_figure

RESULTS = Path(__file__).parent / "results"
# Keys are variants of benchmarks/variants.py. Padding-free is Hugging Face's own solution and needs
# flash-attn.
RUNGS = {
    "hf_padded": "HF, padded, SDPA",
    "hf_padding_free": "HF, padding-free, flash",
    "unpadded": "unpadded",
    "unpadded_larger": "unpadded, larger microbatch",
    "ours_eager": "packed",
    "ours": "packed and compiled",
}
MICROBATCHES = {"cpu": (4, 8), "cuda": (8, 16, 32, 64, 128)}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    device = options.device
    setup = setup_of(options, options.model, "full")
    workload = packed_workload(
        options.lengths,
        vocabulary=setup.config().vocab_size,
        labelled=1.0,
        pack_tokens=options.pack_tokens,
        num_packs=options.packs,
        microbatches=MICROBATCHES[device],
    )
    report = new_report(
        device, {"device": device, "model": options.model, "precision": options.precision}
    )
    print(as_line(report["machine"]), flush=True)
    chosen = Options(repeats=options.repeats, memory=True)
    rows = _rows(setup, workload)
    result = compare({"full": setup}, workload, list(RUNGS), chosen, rows)
    for row in result["variants"]:
        row["title"] = RUNGS[row["variant"]]
    report["results"] = [{"model": options.model, **result}]
    return report


def _rows(setup: Any, workload: Any) -> dict[str, int]:
    """Return the rows of each padded rung's microbatch.

    The first rungs have Hugging Face's best size, and `unpadded_larger` has its own best size, at
    least as large. On a CPU nothing is searched for, because a larger microbatch gains nothing.
    """
    first, *larger = workload.microbatches
    if setup.device == "cpu":
        return {BASELINE: first, "unpadded": first, "unpadded_larger": (larger or [first])[-1]}
    bench = Bench(setup)
    best = best_rows(bench, BASELINE, workload) or first
    return {
        BASELINE: best,
        "unpadded": best,
        "unpadded_larger": max(best_rows(bench, "unpadded", workload) or best, best),
    }


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw three panels, real tokens per second, fill and peak memory, in path.png and path.svg."""
    (result,) = report["results"]
    rungs = [row for row in result["variants"] if "absent" not in row][::-1]  # the first on top
    unit = "CPU-second" if report["settings"]["device"] == "cpu" else "second"
    with new_figure(path.parent, path.stem, (8.4, 0.42 * len(rungs) + 1.5), columns=3) as panels:
        figure = panels[0].figure
        panels[0].get_gridspec().set_width_ratios([3, 1.2, 1.2])
        figure.suptitle(_title(report), fontsize=9.5, x=0.01, ha="left")
        speeds = [row["tokens_per_second"] for row in rungs]
        ratios = [row.get("over_hf_padded", {"median": 1.0})["median"] for row in rungs]
        texts = [f"{v:,.0f}   {ratio:.2f}×" for v, ratio in zip(speeds, ratios, strict=True)]
        titles = [row["title"] for row in rungs]
        _bars(panels[0], speeds, texts, f"real tokens per {unit}", titles)
        fills = [100 * row["fill"] for row in rungs]
        _bars(panels[1], fills, [f"{fill:.0f} %" for fill in fills], "slots filled")
        memory = [row.get("peak_memory_gib", 0.0) for row in rungs]
        _bars(panels[2], memory, [f"{gib:.1f} GiB" for gib in memory], "peak memory")


def _title(report: dict[str, Any]) -> str:
    machine, settings = report["machine"], report["settings"]
    workload = report["results"][0]["workload"]
    return (
        f"SmolLM2 {settings['model'].removeprefix('smollm2-')}, full fine-tuning,"
        f" {settings['precision']}; {workload['documents']} documents,"
        f" {workload['tokens']:,} tokens per step\n"
        f"{machine['device']}, torch {machine['torch']}, {machine['date']}"
    )


def _bars(
    axes: Any, values: list[float], texts: list[str], title: str, names: list[str] | None = None
) -> None:
    places = range(len(values))
    shades = ["#0072B2" if names else FAINT] * len(values)
    if names:
        shades[-1] = FAINT  # the baseline
    axes.barh(places, values, color=shades, height=0.62)
    for place, value, text in zip(places, values, texts, strict=True):
        axes.annotate(text, (value, place), (4, 0), textcoords="offset points", va="center")
    axes.set_title(title, color="#555555")
    axes.set_xlim(0, 1.38 * max([*values, 1e-9]))
    axes.set_yticks(places, names or [""] * len(values))
    axes.tick_params(axis="both", length=0)
    axes.set_xticks([])
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--model", default="smollm2-135m", help="a shipped shape")
    add("--lengths", default="a", choices=("a", "b", "c"))
    add("--pack-tokens", type=int)
    add("--packs", type=int, help="per step")
    add_shipped(made)
    add("--repeats", type=int)
    add("--json", type=Path, help="file to write; the picture is written beside it")
    add("--draw", type=Path, help="only draw the picture, from this JSON")
    options = made.parse_args(arguments)
    for key in ("precision", "compile", "pack_tokens", "packs", "repeats"):
        if getattr(options, key) is None:
            setattr(options, key, DEFAULTS[options.device][key])
    if options.compile == "none":
        options.compile = "layers"  # the last rung is the compiled one
    return options


def main() -> None:
    options = parse()
    if options.draw:
        draw(json.loads(options.draw.read_text(encoding="utf-8")), options.draw.with_suffix(""))
        return
    path = options.json or RESULTS / f"ladder_{options.device}.json"
    report = measure(options)
    write_json(report, path)
    draw(report, path.with_suffix(""))
    print(markdown(report["results"], options.device))


if __name__ == "__main__":
    main()
