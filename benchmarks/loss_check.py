"""Check that the shipped path learns as well as the plain one; run by `step_time.py --check`.

`ours` as shipped (amp_bf16, its kernels, compiled where it ships compiled) and the same model in
eager fp32 train from the same weights on the same data, with several seeds. The difference between
their losses is compared with the difference between seeds. The data is a Markov chain, so that
there is something to learn: every token has four successors, with probabilities 8:4:2:1.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.machine import as_line
from benchmarks.report import new_report, write_json
from benchmarks.variants import Bench, Setup
from benchmarks.workloads import LENGTHS, Workload
from foundry_ext.packing.collator import Document

# A small shape for a CPU; a GPU trains the named model.
SMALL = {
    "hidden_size": 144,
    "head_dim": 16,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "vocab_size": 512,
}
LEARNING_RATE = {"cpu": 3e-3, "cuda": 5e-4}
PACK_TOKENS = {"cpu": 1024, "cuda": 16384}
NUM_STATES = 512
SUCCESSORS = np.array([8, 4, 2, 1]) / 15
LAST = 20  # steps whose mean loss is compared

SetupOf = Callable[[argparse.Namespace, str, str], Setup]


def run(options: argparse.Namespace, setup_of: SetupOf) -> dict[str, Any]:
    """Train both paths for every seed, print a table and say whether they differ."""
    device = options.device
    setup = dataclasses.replace(
        setup_of(options, options.models[0], options.methods[0]),
        learning_rate=LEARNING_RATE[device],
        precision="fp32" if options.precision == "fp32" else "amp_bf16",
        config_overrides=SMALL if device == "cpu" else {},
    )
    report = new_report(device, {"setup": dataclasses.asdict(setup), "steps": options.check_steps})
    print(as_line(report["machine"]))
    print(f"{setup.precision}, compile {setup.compile}; {options.check_steps} steps", flush=True)
    print("| seed | eager fp32 | as shipped | difference | largest in a step |\n|" + "---|" * 5)
    for seed in range(options.check_seeds):
        row = compare_seed(setup, seed, options.check_steps)
        report["results"].append(row)
        cells = [f"{row[key]:.4f}" for key in ("plain", "shipped")]
        cells += [f"{row['difference']:+.5f}", f"{row['largest']:.5f}"]
        print(f"| {seed} | " + " | ".join(cells) + " |", flush=True)
    report["summary"] = summary(report["results"])
    print(report["summary"]["text"])
    if options.json:
        write_json(report, options.json)
    return report


def compare_seed(setup: Setup, seed: int, num_steps: int) -> dict[str, Any]:
    """Return the loss curves of both paths, and their means over the last steps."""
    shipped_setup = dataclasses.replace(setup, seed=seed)
    plain_setup = dataclasses.replace(
        shipped_setup, precision="fp32", compile="none", backend="sdpa", loss="chunked"
    )
    plain = train(plain_setup, "ours_eager", seed, num_steps)
    shipped = train(shipped_setup, "ours", seed, num_steps)
    last = min(LAST, num_steps)
    means = [statistics.fmean(curve[-last:]) for curve in (plain, shipped)]
    return {
        "seed": seed,
        "plain": means[0],
        "shipped": means[1],
        "difference": means[1] - means[0],
        "largest": max(abs(a - b) for a, b in zip(plain, shipped, strict=True)),
        "curves": {"plain": plain, "shipped": shipped},
    }


def train(setup: Setup, name: str, seed: int, num_steps: int) -> list[float]:
    """Return the loss of every step."""
    bench, curve = Bench(setup), []
    for workload in chain_workloads(setup, seed, num_steps):
        curve.append(bench.step(name, workload)())
    return [loss.item() for loss in curve]


def chain_workloads(setup: Setup, seed: int, num_steps: int) -> Iterator[Workload]:
    """Yield one full pack of new documents per step."""
    generator = np.random.default_rng(seed)
    successors = np.random.default_rng(0).integers(NUM_STATES, size=(NUM_STATES, 4))
    capacity = PACK_TOKENS[setup.device]
    median, sigma = LENGTHS["c"]
    for step in range(num_steps):
        lengths = generator.lognormal(np.log(median), sigma, capacity // 16).clip(16, capacity // 2)
        total = np.cumsum(lengths.astype(int))
        lengths = lengths.astype(int)[total <= capacity].tolist()
        yield Workload(
            name=f"step {step}",
            documents=_chain(lengths, successors, generator),
            pack_tokens=capacity,
            microbatches=(1,),
        )


def _chain(
    lengths: Sequence[int], successors: np.ndarray, generator: np.random.Generator
) -> list[Document]:
    longest = max(lengths)
    ids = np.empty((len(lengths), longest), dtype=np.int64)
    ids[:, 0] = generator.integers(NUM_STATES, size=len(lengths))
    choices = generator.choice(4, size=ids.shape, p=SUCCESSORS)
    for position in range(1, longest):
        ids[:, position] = successors[ids[:, position - 1], choices[:, position]]
    return [
        Document(row[:length], np.arange(length) > 0)
        for row, length in zip(ids, lengths, strict=True)
    ]


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Compare the differences with the standard deviation of the plain path's loss over seeds."""
    differences = [row["difference"] for row in rows]
    mean = statistics.fmean(differences)
    largest = max(abs(value) for value in differences)
    if len(rows) < 2:
        return {"mean_difference": mean, "text": "Seed noise needs two seeds: --check-seeds 3."}
    noise = statistics.stdev(row["plain"] for row in rows)
    within = largest < noise
    return {
        "mean_difference": mean,
        "largest_difference": largest,
        "seed_noise": noise,
        "within_noise": within,
        "text": (
            f"Shipped minus plain: mean {mean:+.5f}, at most {largest:.5f}; another seed changes"
            f" the loss by {noise:.5f} (standard deviation): "
            + ("within seed noise." if within else "MORE than seed noise.")
        ),
    }
