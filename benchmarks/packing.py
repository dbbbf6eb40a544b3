"""Fill, speed and side effects of packing, compared with simple baselines.

    python benchmarks/packing.py            # 100k documents, some seconds
    python benchmarks/packing.py --large    # also 10M documents: seconds and peak memory

Only indices are packed, on one thread. Seconds are CPU time of the process, the least of several
repeats. Lengths are log-normal, clipped at 16 and 2048.
"""

import argparse
import platform
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # run from a checkout, installed or not

from foundry_ext.packing.algorithm import pack

LENGTHS = {"a": (350, 0.9), "b": (600, 1.4), "c": (80, 0.7)}  # median, sigma
CAPACITIES = (2048, 8192)
NUM_DOCUMENTS = 100_000
REPEATS = 7

# A packer takes (lengths, capacity, epoch) and returns (documents in pack order, offsets of packs).
Packed = tuple[np.ndarray, np.ndarray]
Packer = Callable[[np.ndarray, int, int], Packed]


def ours(lengths: np.ndarray, capacity: int, epoch: int) -> Packed:
    packs = pack(lengths, capacity, seed=0, epoch=epoch)
    return packs.documents, packs.offsets


def next_fit(lengths: np.ndarray, capacity: int, epoch: int) -> Packed:
    documents = np.random.default_rng(epoch).permutation(len(lengths))
    offsets, gap = [], 0
    for i, length in enumerate(lengths[documents].tolist()):
        if length > gap:
            offsets.append(i)
            gap = capacity
        gap -= length
    return documents, np.array([*offsets, len(lengths)])


def best_fit_decreasing(lengths: np.ndarray, capacity: int, epoch: int) -> Packed:
    """Pack with a histogram of gaps: bit g of `open_gaps` is set while some pack has a gap of g."""
    rng = np.random.default_rng(epoch)
    documents = rng.permutation(len(lengths))
    documents = documents[np.argsort(-lengths[documents], kind="stable")]
    with_gap: list[list[int]] = [[] for _ in range(capacity + 1)]
    open_gaps, num_packs, pack_of = 0, 0, []
    for length in lengths[documents].tolist():
        fitting = open_gaps >> length
        if fitting:
            gap = length + (fitting & -fitting).bit_length() - 1
            current = with_gap[gap].pop()
            if not with_gap[gap]:
                open_gaps ^= 1 << gap
        else:
            current, gap, num_packs = num_packs, capacity, num_packs + 1
        pack_of.append(current)
        with_gap[gap - length].append(current)
        open_gaps |= 1 << (gap - length)
    place = rng.permutation(num_packs)[pack_of]
    sizes = np.bincount(place)
    return documents[np.argsort(place, kind="stable")], np.concatenate([[0], np.cumsum(sizes)])


PACKERS: dict[str, Packer] = {
    "next fit": next_fit,
    "best fit decreasing over a histogram, packs shuffled": best_fit_decreasing,
    "**foundry_ext**": ours,
}


def make_lengths(name: str, num: int) -> np.ndarray:
    median, sigma = LENGTHS[name]
    lengths = median * np.exp(sigma * np.random.default_rng(0).standard_normal(num))
    return np.clip(lengths, 16, 2048).astype(np.int32)


def cpu_seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def measure(packer: Packer, lengths: np.ndarray, capacity: int) -> dict[str, float]:
    seconds = min(cpu_seconds(lambda: packer(lengths, capacity, 0)) for _ in range(REPEATS))
    documents, offsets = packer(lengths, capacity, 0)
    num_documents = np.diff(offsets)
    steps = np.repeat(np.arange(len(num_documents)), num_documents)
    ceil = -(-int(lengths.sum(dtype=np.int64)) // capacity)
    return {
        "fill": 100 * lengths.sum(dtype=np.int64) / (len(num_documents) * capacity),
        "above": len(num_documents) - ceil,
        "speed": len(lengths) / seconds / 1000,
        "corr": abs(np.corrcoef(lengths[documents], steps)[0, 1]),
        "cv": num_documents.std() / num_documents.mean(),
    }


def table() -> None:
    columns = ["", *(f"{name}: fill %, packs above ceil" for name in LENGTHS)]
    columns += [
        "k docs/s, least to most",
        "max abs corr(length, step)",
        "documents per pack, CV (a 2k)",
    ]
    print("|", " | ".join(columns), "|")
    print("|---" * len(columns) + "|")
    for title, packer in PACKERS.items():
        results = {
            (name, capacity): measure(packer, make_lengths(name, NUM_DOCUMENTS), capacity)
            for name in LENGTHS
            for capacity in CAPACITIES
        }
        cells = []
        for name in LENGTHS:
            per_capacity = [results[name, capacity] for capacity in CAPACITIES]
            fill = "/".join(f"{r['fill']:.2f}" for r in per_capacity)
            cells.append(fill + ", " + "/".join(f"{r['above']:+.0f}" for r in per_capacity))
        speeds = [r["speed"] for r in results.values()]
        cells.append(f"{min(speeds):.0f} to {max(speeds):.0f}")
        cells.append(f"{max(r['corr'] for r in results.values()):.3f}")
        cells.append(f"{results['a', 2048]['cv']:.2f}")
        print("|", " | ".join([title, *cells]), "|", flush=True)


def large() -> None:
    lengths = make_lengths("a", 10_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds = cpu_seconds(lambda: ours(lengths, 2048, 0))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"\n10M documents (a, 2048): {seconds:.1f} s, peak RSS {after:.0f} MiB "
        f"({before:.0f} MiB before packing, from making the lengths)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure packing against simple baselines.")
    parser.add_argument("--large", action="store_true", help="also pack 10M documents")
    arguments = parser.parse_args()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    cpu = f"{len(models)} x {models[0]}" if models else platform.processor()
    print(f"{cpu}; Python {platform.python_version()}, numpy {np.__version__}")
    print(f"{NUM_DOCUMENTS} documents; capacity {'/'.join(map(str, CAPACITIES))}\n")
    table()
    if arguments.large:
        large()


if __name__ == "__main__":
    main()
