"""Real tokens per second of complete optimizer steps: ours, packed, against Hugging Face's.

    python benchmarks/step_time.py                       # this machine's defaults
    python benchmarks/step_time.py --methods full,lora,dora,rslora --models smollm2-360m
    python benchmarks/step_time.py --scale pack_tokens   # how cost grows; model, document_length
    python benchmarks/step_time.py --check               # whether `ours` learns as well as fp32

A step is forward and backward of all its microbatches, AdamW (fused) and zero_grad; no gradient
clipping, no data loading. Weights and tokens are random with fixed seeds. All variants compute the
same documents, and only the documents' tokens count. Variants take turns, and ratios are of times
from the same round. Time is CPU time of the process on a CPU and wall time on a GPU.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # run from a checkout, installed or not

from benchmarks import loss_check, scaling
from benchmarks.comparison import Options, compare
from benchmarks.machine import as_line
from benchmarks.report import default_device, markdown, new_report, write_json
from benchmarks.variants import METHODS, VARIANTS, Setup
from benchmarks.workloads import LENGTHS, Workload, named_case, packed_workload
from foundry_ext.models.attention import BACKENDS
from foundry_ext.models.loss import LOSSES

# By device. A CPU computes some hundred tokens per second, so it gets few variants and documents.
# 4,000 padded slots take 7 GB there.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {
        "precision": "bf16",
        "lengths": ["longest", "to2048"],
        "labelled": [1.0, 0.5],
        "variants": ["hf_padded", "ours"],
        "pack_tokens": 1024,
        "packs": 3,
        "microbatches": (1, 4),
        "compile": "none",
        "repeats": 2,
    },
    "cuda": {
        "precision": "amp_bf16",
        "lengths": ["a", "b", "c"],
        "labelled": [1.0],
        "variants": [name for name in VARIANTS if not name.startswith("unpadded")],
        "pack_tokens": 16384,
        "packs": 4,
        "microbatches": (4, 8, 16, 32, 64, 128),
        "compile": "layers",
        "repeats": 7,
    },
}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--models", type=_names, default=["smollm2-135m"], help="shipped shapes")
    add("--methods", type=_names, default=["full"], help=",".join(METHODS))
    add("--variants", type=_names, help=",".join(VARIANTS))
    add("--lengths", type=_names, help=f"{','.join(LENGTHS)}, longest, to2048")
    add("--labelled", type=_numbers, help="shares of a document's tokens with a label")
    add("--pack-tokens", type=int, help="capacity of a pack, for lengths a, b and c")
    add("--packs", type=int, help="per step, for lengths a, b and c")
    add("--documents", type=int, default=8, help="per step, for longest; to2048 has a quarter")
    add("--microbatches", type=_counts, help="rows of padded microbatches to choose from")
    add_shipped(made)
    add("--repeats", type=int)
    add("--memory", action="store_true", help="peak memory on a CPU too, one process per variant")
    add("--workers", type=int, help="also measure the wait for a loader with N workers")
    add("--json", type=Path, help="file to write")
    add("--scale", choices=scaling.AXES, help="how cost per token grows")
    add("--draw", type=Path, help="only draw the picture, from the JSON of --scale")
    add("--check", action="store_true", help="compare the loss after training with the fp32 path")
    add("--check-steps", type=int, default=200)
    add("--check-seeds", type=int, default=3)
    return made


def add_shipped(made: argparse.ArgumentParser) -> None:
    """Add the options that set how ours runs; by default as shipped for the device."""
    add = made.add_argument
    add("--device", default=default_device(), choices=("cpu", "cuda"))
    add("--precision", choices=("bf16", "amp_bf16", "fp32"))
    add("--backend", default="auto", choices=BACKENDS, help="our attention")
    add("--loss", default="chunked", choices=LOSSES, help="our loss")
    add("--compile", choices=("none", "layers", "model"), help="part of ours to compile")
    add("--compile-mode", default="default")
    add("--dynamic", action="store_true", help="compile ours for any shape")
    add("--activation-checkpointing", action="store_true", help="on both sides")
    add("--frozen-dtype", default="fp32", choices=("fp32", "bf16"), help="on both sides")


def _names(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _counts(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    made = parser()
    options = made.parse_args(arguments)
    with_defaults(options)
    known = {"methods": METHODS, "variants": VARIANTS, "lengths": [*LENGTHS, "longest", "to2048"]}
    for key, names in known.items():
        for value in getattr(options, key):
            if value not in names:
                made.error(f"--{key}: {value!r} is unknown; choose from {', '.join(names)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        made.error("--device: 'cuda' is not available; use cpu")
    return options


def with_defaults(options: argparse.Namespace) -> None:
    for key, value in DEFAULTS[options.device].items():
        if getattr(options, key, None) is None:
            setattr(options, key, value)


def setup_of(options: argparse.Namespace, model: str, method: str) -> Setup:
    keys = ("device", "precision", "backend", "loss", "compile", "compile_mode", "dynamic")
    keys += ("activation_checkpointing", "frozen_dtype")
    return Setup(model=model, method=method, **{key: getattr(options, key) for key in keys})


def workloads(options: argparse.Namespace, vocabulary: int) -> Iterator[Workload]:
    for name in options.lengths:
        for labelled in options.labelled:
            common = {"vocabulary": vocabulary, "labelled": labelled}
            if name in LENGTHS:
                yield packed_workload(
                    name,
                    pack_tokens=options.pack_tokens,
                    num_packs=options.packs,
                    microbatches=options.microbatches,
                    **common,
                )
            else:
                few = name == "to2048"
                count = max(options.documents // 4, 1) if few else options.documents
                yield named_case(name, count=count, **common)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    report = new_report(options.device, _settings(options))
    print(as_line(report["machine"]), flush=True)
    chosen = Options(repeats=options.repeats, memory=options.memory, workers=options.workers)
    for model in options.models:
        setups = {method: setup_of(options, model, method) for method in options.methods}
        vocabulary = next(iter(setups.values())).config().vocab_size
        for workload in workloads(options, vocabulary):
            print(f"{model}, {workload.name}, {workload.num_loss_tokens} labels", flush=True)
            result = compare(setups, workload, options.variants, chosen, say=_say)
            report["results"].append({"model": model, **result})
            if options.json:
                write_json(report, options.json)
            print("\n" + markdown(report["results"][-1:], options.device) + "\n", flush=True)
    return report


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    return {key: str(v) if isinstance(v, Path) else v for key, v in vars(options).items()}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    options = parse()
    if options.draw:
        scaling.draw(
            json.loads(options.draw.read_text(encoding="utf-8")), options.draw.with_suffix("")
        )
    elif options.scale:
        scaling.run(options, setup_of)
    elif options.check:
        loss_check.run(options, setup_of)
    else:
        report = measure(options)
        print("All results:\n\n" + markdown(report["results"], options.device))


if __name__ == "__main__":
    main()
