"""Batches of windows of shards for one rank: only the window in training is planned.

Its place in an epoch comes from the number of packs in each window. To count them, every window is
packed once, which the ranks share; whoever keeps the numbers plans one window to go on.
"""

import hashlib
import logging
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from foundry_ext.packing.packs import Packs
from foundry_ext.packing.sampler import BatchSampler
from foundry_ext.packing.windows import (
    EpochPlan,
    WindowSettings,
    make_windows,
    pack_window,
    reordered_window,
)
from foundry_ext.utils.errors import UserError

log = logging.getLogger(__name__)

# One batch in so many that later epochs may have more than the first, if their documents differ.
_SLACK = 200

Count = Callable[[int, int, Callable[[int], int]], NDArray[np.int64]]
"""(epoch, num_windows, packs of a window by its number) -> [num_windows] packs of each."""


class Shards(Protocol):
    """Documents in shards. An epoch may use a shard several times, or a part of it: as *units*."""

    @property
    def varies(self) -> bool:
        """Whether epochs have different documents."""
        ...

    def sizes(self) -> NDArray[np.int64]:
        """Return [num_units], documents of each unit."""
        ...

    def documents(
        self, epoch: int, units: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.integer]]:
        """Return [n] documents of units, in order, and [n] tokens of each; 0 leaves one out."""
        ...

    def prepare(self, units: NDArray[np.int64], following: NDArray[np.int64]) -> None:
        """Make the units of a window readable, and begin to do so for those of the next."""
        ...


def count_alone(epoch: int, num_windows: int, count: Callable[[int], int]) -> NDArray[np.int64]:
    """Return the packs of each window, all counted by this process."""
    return np.array([count(number) for number in range(num_windows)], dtype=np.int64)


class WindowSampler(BatchSampler):
    """Batches of the windows of an epoch; packs hold documents as `Shards` names them.

    Args:
        dataset: as in BatchSampler, like `settings`.
        shards: the documents.
        window: documents that a window has at least.
        count: counts the packs of each window. All ranks call it together.

    Raises:
        UserError: there are no documents, or with `drop_last` too few for one batch.
    """

    def __init__(
        self,
        dataset: Dataset,
        shards: Shards,
        *,
        window: int,
        count: Count = count_alone,
        **settings: Any,
    ):
        super().__init__(dataset, **settings)
        self.shards, self._count = shards, count
        self.settings = WindowSettings(self.capacity, window, self.seed, self.shuffle)
        self._plans: dict[int, EpochPlan] = {}
        self._packs: dict[tuple[int, int], Packs] = {}  # of the last two windows in use
        if self.num_packs(0) == 0:
            raise UserError(
                "no documents left to train on; the counts logged above say why rows were dropped"
            )
        self._check_not_empty()

    def plan(self, epoch: int) -> EpochPlan:
        """Return the windows of an epoch.

        Composer reads the number of batches once and holds every epoch to it. An epoch whose own
        windows have one batch more or less therefore gets the first epoch's, and the packs in each
        of them, in another order. If epochs have different documents, an epoch may be shorter.
        """
        epoch = self._planned(epoch)
        if epoch not in self._plans:
            plan = self._own_plan(epoch)
            if epoch and not self._fits(plan):
                log.info("epoch %d: takes the first epoch's packs in another order", epoch)
                plan = self.plan(0).in_another_order(self.seed, epoch)
            self._plans = {key: self._plans[key] for key in self._plans if key == 0}
            self._plans[epoch] = plan
        return self._plans[epoch]

    def _fits(self, plan: EpochPlan) -> bool:
        num_batches = self._batches_of(plan.num_packs)
        return num_batches <= len(self) if self.shards.varies else num_batches == len(self)

    def _planned(self, epoch: int) -> int:
        """Return the epoch whose plan an epoch has."""
        return epoch if self.shuffle or self.shards.varies else 0

    def __len__(self) -> int:
        """Return the most batches that an epoch has."""
        if self._num_batches is None:
            own = super().__len__()
            self._num_batches = own + (1 + own // _SLACK if self.shards.varies and own else 0)
        return self._num_batches

    def num_batches(self, epoch: int) -> int:
        return min(len(self), self._batches_of(self.num_packs(epoch)))

    def _own_plan(self, epoch: int) -> EpochPlan:
        windows = make_windows(self.shards.sizes(), self.settings, epoch)
        full = [0, 0]  # tokens, capacity

        def count(number: int) -> int:
            packs = self._pack(epoch, number, windows[number])[1]
            full[0] += packs.num_tokens
            full[1] += len(packs) * packs.capacity
            return len(packs)

        counts = self._count(epoch, len(windows), count)
        text = "epoch %d: %d windows, %d packs%s"
        efficiency = f", {100 * full[0] / full[1]:.2f} % full" if full[1] else ""
        log.info(text, epoch, len(windows), counts.sum(), efficiency)
        return EpochPlan(windows, counts, epoch, np.arange(len(windows)))

    def _pack(
        self, epoch: int, number: int, units: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], Packs]:
        documents, lengths = self.shards.documents(epoch, units)
        return documents, pack_window(lengths, self.settings, epoch=epoch, number=number)

    def window(self, epoch: int, position: int) -> Packs:
        """Return the packs of a window of an epoch, which hold documents."""
        epoch = self._planned(epoch)
        if (epoch, position) not in self._packs:
            plan = self.plan(epoch)
            number = int(plan.numbers[position])
            documents, packs = self._pack(plan.source, number, plan.windows[position])
            if len(packs) != plan.counts[position]:
                raise RuntimeError(
                    f"window {position} of epoch {epoch} has {len(packs)} packs, and"
                    f" {plan.counts[position]} when they were counted"
                )
            if plan.source != epoch:
                packs = reordered_window(packs, self.seed, epoch, number)
            packs = Packs(
                documents[packs.documents], packs.offsets, packs.capacity, packs.num_tokens
            )
            last = list(self._packs)[-1:]
            self._packs = {key: self._packs[key] for key in last} | {(epoch, position): packs}
        return self._packs[epoch, position]

    def num_packs(self, epoch: int) -> int:
        return self.plan(epoch).num_packs

    def documents_of_pack(self, epoch: int, index: int) -> NDArray[np.int64]:
        window, pack = self.plan(epoch).locate(index)
        return self.window(epoch, window)[pack]

    def first_window(self) -> tuple[NDArray[np.int64], NDArray[np.integer], Packs]:
        documents, lengths = self.shards.documents(0, self.plan(0).windows[0])
        used = lengths > 0
        packs = pack_window(lengths[used], self.settings, epoch=0, number=0)
        return documents[used], lengths[used], packs

    def batch(self, index: int) -> list[NDArray[np.int64]]:
        plan = self.plan(self.epoch)
        size = self.batch_packs * self.num_replicas
        first = plan.locate(min(index * size, plan.num_packs - 1))[0]
        last = plan.locate(min((index + 1) * size, plan.num_packs) - 1)[0]
        for position in range(first, last + 1):
            following = plan.windows[position + 1 : position + 2]
            self.shards.prepare(
                plan.windows[position],
                following[0] if following else np.empty(0, np.int64),
            )
        return super().batch(index)

    def plan_digest(self, epoch: int) -> str:
        plan = self.plan(epoch)
        digest = hashlib.sha256(plan.counts.tobytes())
        digest.update(self.window(epoch, 0).documents.tobytes())
        return digest.hexdigest()[:16]
