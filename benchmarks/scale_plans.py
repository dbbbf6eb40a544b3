"""Plans over the sizes of documents alone: fill, memory and start at 10 million and at a billion.

A part of benchmarks/scale.py.
"""

import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from foundry_ext.data.prepared.census import Census, take_census
from foundry_ext.data.prepared.documents import PreparedDocuments
from foundry_ext.data.prepared.index import PreparedIndex, ShardAbout
from foundry_ext.data.prepared.shard import RowSizes
from foundry_ext.data.prepared.source import PreparedSource
from foundry_ext.packing.window_sampler import WindowSampler
from tests.data.prepared.kit import make_recipe


class NoFiles:
    """Shards that are never opened."""

    local = None

    def announce(self, now: Any, next_: Any) -> None:
        pass

    def need(self, now: Any, next_: Any) -> None:
        pass


class SparseIndex(PreparedIndex):
    """Sizes in a file of zeros, each of which stands for 400 tokens."""

    def sizes(self, shard: int) -> RowSizes:
        found = super().sizes(shard)
        return RowSizes(found.lengths + np.uint32(400), np.ones_like(found.lengths))


def planted(
    folder: Path, num: int, *, per_shard: int, lengths: Callable[[int], np.ndarray] | None
) -> PreparedSource:
    """Return a source of which only the sizes exist; without `lengths` in a sparse file."""
    counts = [min(per_shard, num - at) for at in range(0, num, per_shard)]
    about = {"raw_data": {"bytes": 2**26}}
    shards = [
        ShardAbout(
            key=f"{number:032x}",
            piece=str(number),
            rows=count,
            tokens=count,
            longest=8192,
            loss_tokens=count,
            num_untrained=0,
            mds=about,
        )
        for number, count in enumerate(counts)
    ]
    path = folder / f"lengths-{num}.npy"
    array = np.lib.format.open_memmap(path, "w+", np.uint32, (num,))
    if lengths is not None:
        for number, count in enumerate(counts):
            array[number * per_shard : number * per_shard + count] = lengths(count)
    array.flush()
    kind = PreparedIndex if lengths is not None else SparseIndex
    index = kind(
        make_recipe("text"),
        shards,
        np.load(path, mmap_mode="r"),
        None,
        np.cumsum([0, *counts], dtype=np.int64),
    )
    return PreparedSource(index, NoFiles(), 8192, "truncate")  # pyright: ignore


def log_normal(count: int, median: float = 350.0, sigma: float = 0.9) -> np.ndarray:
    rng = np.random.default_rng(count)
    return np.clip(median * np.exp(sigma * rng.standard_normal(count)), 16, 8192).astype(np.uint32)


def sampler_of(documents: PreparedDocuments, **options: Any) -> WindowSampler:
    class Sized:
        def __len__(self) -> int:
            return documents.census.num_documents

    settings = {"capacity": 16384, "batch_packs": 4, "rank": 0, "world_size": 1}
    settings |= {"shuffle": True, "seed": 17, "window": documents.window}
    return WindowSampler(Sized(), documents, **{**settings, **options})  # pyright: ignore


def anonymous_mb() -> float:
    """Return this process's anonymous memory, without pages of files."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def measure_plans(folder: Path) -> None:
    """Fill, memory and start of plans over 10 million documents and over a billion."""
    before = anonymous_mb()
    start = time.process_time()
    source = planted(folder, 10_000_000, per_shard=100_000, lengths=log_normal)
    made, start = time.process_time() - start, time.process_time()
    documents = PreparedDocuments([source], [take_census(source, "planted")], window=2**18)
    census, start = time.process_time() - start, time.process_time()
    sampler = sampler_of(documents)
    num = len(sampler)
    count = time.process_time() - start
    full = documents.census.num_tokens / (sampler.num_packs(0) * 16384)
    print(f"fill at window 262,144, capacity 16,384, 10M documents: {100 * full:.3f} %")
    start = time.process_time()
    sampler.batch(num // 2)
    first = time.process_time() - start
    print(
        f"10M documents: census {census:.2f} CPU-s, all windows packed once {count:.2f}, a batch in"
        f" the middle {first:.2f}, {anonymous_mb() - before:.0f} MB of memory"
        f" (their sizes were drawn in {made:.1f})"
    )
    del sampler, documents, source
    before = anonymous_mb()
    source = planted(folder, 1_000_000_000, per_shard=2**18, lengths=None)
    lengths = np.zeros(8193, dtype=np.int64)
    lengths[400] = 1_000_000_000
    counts = Census(np.zeros(6, np.int64), 0, 0, lengths)
    documents = PreparedDocuments([source], [counts], window=2**18)
    packs_of_a_window = -(-(2**18) // (16384 // 400))
    known = lambda epoch, number, work: np.full(number, packs_of_a_window - 1)  # noqa: E731
    start = time.perf_counter()
    sampler = sampler_of(documents, count=known)
    sampler.batch(len(sampler) * 2 // 3)
    print(
        f"1G documents (sparse sizes), counts known: first batch at two thirds of the epoch in"
        f" {time.perf_counter() - start:.2f} s, {anonymous_mb() - before:.0f} MB of memory"
    )
