"""Windows: groups of shards whose documents are shuffled and packed together.

A plan over all documents takes seconds and 100 MB per 10 million of them, on every rank. With
windows only the documents in training are planned:

1. The shards are shuffled by (seed, epoch).
2. Consecutive shards form a window, as many as have `window` documents.
3. The documents of a window are shuffled and packed alone, by `pack`.

    shards of 3, 4, 2, 5 documents, window 6  ->  shards [2, 1], then [3, 0]

An epoch is its windows' packs, one window after the other. A batch may hold the last packs of one
window and the first of the next. The number of packs in each window tells where a batch is, so a
run that goes on plans one window, wherever it stopped.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foundry_ext.packing.algorithm import pack, pack_in_order
from foundry_ext.packing.packs import Packs, check_least, reordered


@dataclass(frozen=True)
class WindowSettings:
    """Settings that decide windows and their packs."""

    capacity: int
    """Tokens that a pack can hold."""
    window: int
    """Documents that a window has at least, if there are as many."""
    seed: int
    shuffle: bool
    """Otherwise shards and documents keep their order, and packs are of neighbours."""


def make_windows(
    sizes: Sequence[int] | NDArray[np.integer], settings: WindowSettings, epoch: int
) -> list[NDArray[np.int64]]:
    """Return the shards of each window of an epoch, in training order.

    The last window has at least half of `window` documents, unless it is the only one.

    Args:
        sizes: [num_shards], documents of each shard, 0 or more.
        settings: see WindowSettings.
        epoch: decides the order of the shards, together with the seed.
    """
    check_least(1, window=settings.window)
    sizes = np.asarray(sizes, dtype=np.int64)
    order = np.arange(len(sizes))
    if settings.shuffle:
        order = np.random.default_rng((settings.seed, epoch)).permutation(len(sizes))
    starts, documents = [0], 0
    for position, size in enumerate(sizes[order].tolist()):
        if documents >= settings.window:
            starts.append(position)
            documents = 0
        documents += size
    if len(starts) > 1 and 2 * documents < settings.window:
        starts.pop()
    return np.split(order, starts[1:]) if len(order) else []


def pack_window(
    lengths: NDArray[np.integer], settings: WindowSettings, *, epoch: int, number: int
) -> Packs:
    """Return the packs of a window; their indices are into `lengths`.

    Args:
        lengths: [num_documents], tokens of each document of the window; 0 leaves a document out.
        settings: see WindowSettings.
        epoch: decides the packs, together with the seed and `number`.
        number: position of the window in the epoch.
    """
    used = np.flatnonzero(lengths)
    if settings.shuffle:
        seed, number = settings.seed, number
        packs = pack(lengths[used], settings.capacity, seed=seed, epoch=epoch, number=number)
    else:
        packs = pack_in_order(lengths[used], settings.capacity)
    return Packs(used[packs.documents], packs.offsets, packs.capacity, packs.num_tokens)


@dataclass(frozen=True)
class EpochPlan:
    """The windows of an epoch and how many packs each has, without the packs themselves.

    Attributes:
        windows: the shards of each window.
        counts: [num_windows] int64, packs of each window.
        source: the epoch whose packs these are; another one after `in_another_order`.
        numbers: [num_windows] positions of the windows in that epoch.
    """

    windows: list[NDArray[np.int64]]
    counts: NDArray[np.int64]
    source: int
    numbers: NDArray[np.int64]

    @property
    def num_packs(self) -> int:
        return int(self.counts.sum())

    def locate(self, index: int) -> tuple[int, int]:
        """Return (window, pack in it) of a pack of the epoch.

        Raises:
            IndexError: there is no such pack.
        """
        if not 0 <= index < self.num_packs:
            raise IndexError(f"pack {index} of {self.num_packs}")
        ends = np.cumsum(self.counts)
        window = int(np.searchsorted(ends, index, side="right"))
        return window, index - int(ends[window] - self.counts[window])

    def in_another_order(self, seed: int, epoch: int) -> "EpochPlan":
        """Return the same windows in the order of another epoch."""
        order = np.random.default_rng((seed, epoch)).permutation(len(self.windows))
        windows = [self.windows[i] for i in order]
        return EpochPlan(windows, self.counts[order], self.source, self.numbers[order])


def reordered_window(packs: Packs, seed: int, epoch: int, number: int) -> Packs:
    """Return the packs of a window in the order of another epoch."""
    return reordered(packs, np.random.default_rng((seed, epoch, number)))
