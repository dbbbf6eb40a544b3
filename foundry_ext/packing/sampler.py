"""Batches of packs for one rank and epoch: a walk over a plan, with no state carried over.

The plan is a pure function of (lengths, capacity, seed, epoch), or of (lengths, capacity) without
shuffling, and does not depend on the ranks. A global batch is `batch_packs` packs on each of
`world_size` ranks, which take packs in turn. The last one is completed with empty packs, so every
rank has the same number of batches and microbatches.

Example, 2 ranks of 1 pack, packs A B C: rank 0 gets [A] [C], rank 1 gets [B] [empty].
"""

import hashlib
import logging
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset, DistributedSampler

from foundry_ext.packing.algorithm import pack, pack_in_order
from foundry_ext.packing.packs import Packs, reordered
from foundry_ext.utils.errors import UserError

log = logging.getLogger(__name__)

_EMPTY = np.empty(0, dtype=np.int64)


class BatchSampler(DistributedSampler):
    """A batch sampler that yields lists of packs, each an int64 array of documents.

    Composer recognises a sampler that distributes data over ranks by its type, DistributedSampler,
    and calls `set_epoch` before every epoch. In evaluation it also cuts off
    `total_size - len(dataset)` samples as padding. Here the two are equal, because an empty pack
    holds no sample.

    Subclasses say which packs an epoch has.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        capacity: int,
        batch_packs: int,
        rank: int,
        world_size: int,
        shuffle: bool,
        seed: int,
        drop_last: bool = False,
    ):
        """Hold the settings.

        Args:
            dataset: `len` is the number of documents.
            capacity: tokens that a pack can hold.
            batch_packs: packs per batch on this rank.
            rank: this process's rank.
            world_size: number of ranks.
            shuffle: make a new plan every epoch. Otherwise every epoch takes the documents in
                their own order, in packs of neighbours.
            seed: seed of the plans; without effect if nothing is shuffled.
            drop_last: leave out a last global batch that is incomplete.
        """
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed)
        self.total_size = len(dataset)  # pyright: ignore[reportArgumentType]
        self.capacity, self.batch_packs = capacity, batch_packs
        self.drop_last = drop_last
        self._resume_at = 0, 0  # epoch, batch
        self._num_batches: int | None = None

    @abstractmethod
    def num_packs(self, epoch: int) -> int:
        """Return the number of packs of an epoch."""

    @abstractmethod
    def documents_of_pack(self, epoch: int, index: int) -> NDArray[np.int64]:
        """Return the documents of one pack of an epoch."""

    @abstractmethod
    def first_window(self) -> tuple[NDArray[np.int64], NDArray[np.integer], Packs]:
        """Return documents that are planned together, from the beginning of the first epoch.

        They are [n] documents, [n] tokens of each, and their packs, which hold indices into both.
        Without windows they are all documents of the epoch.
        """

    @abstractmethod
    def plan_digest(self, epoch: int) -> str:
        """Return a hash of an epoch's packs, to compare the packs of two runs."""

    def _check_not_empty(self) -> None:
        if len(self) == 0:
            raise UserError(
                f"{self.num_packs(0)} packs do not fill one global batch of"
                f" {self.batch_packs} x {self.num_replicas}; lower the batch size, or set"
                " drop_last: false"
            )

    def _batches_of(self, num_packs: int) -> int:
        complete, rest = divmod(num_packs, self.batch_packs * self.num_replicas)
        return complete if self.drop_last else complete + bool(rest)

    def __len__(self) -> int:
        """Return the number of batches per epoch, the same in every epoch and on every rank."""
        if self._num_batches is None:
            self._num_batches = self._batches_of(self.num_packs(0))
        return self._num_batches

    def resume_at(self, *, epoch: int, batch: int) -> None:
        """Start the next iteration at `batch` if it is over `epoch`, otherwise at 0."""
        self.epoch = epoch
        self._resume_at = epoch, batch

    @property
    def first_batch(self) -> int:
        """First batch of the next iteration.

        If `max_duration` stops Composer right after an epoch's last batch, the checkpoint holds
        that batch's number although the clock is in the next epoch already. That epoch starts at 0.
        """
        epoch, batch = self._resume_at
        return batch if epoch == self.epoch else 0

    def __iter__(self) -> Iterator[list[NDArray[np.int64]]]:
        first, self._resume_at = self.first_batch, (0, 0)
        for batch in range(first, self.num_batches(self.epoch)):
            yield self.batch(batch)

    def num_batches(self, epoch: int) -> int:
        """Return the number of batches of an epoch, at most `len`."""
        return len(self)

    def batch(self, index: int) -> list[NDArray[np.int64]]:
        """Return this rank's packs of one batch, without walking over the batches before it."""
        global_size = self.batch_packs * self.num_replicas
        start, num_packs = index * global_size + self.rank, self.num_packs(self.epoch)
        packs = range(start, start + global_size, self.num_replicas)
        return [self.documents_of_pack(self.epoch, i) if i < num_packs else _EMPTY for i in packs]


class PackedBatchSampler(BatchSampler):
    """Batches of a plan over all documents; packs hold indices into them.

    Args:
        dataset: as in BatchSampler, like `settings`.
        lengths: [num_documents], tokens of each document; 0 leaves a document out.

    Raises:
        UserError: there are no documents, or with `drop_last` too few for one batch.
    """

    def __init__(self, dataset: Dataset, lengths: NDArray[np.integer], **settings: Any):
        super().__init__(dataset, **settings)
        self.used = np.flatnonzero(lengths)
        self.lengths = np.asarray(lengths)[self.used]
        self._plan: tuple[int, Packs] | None = None
        if len(self.used) == 0:
            raise UserError(
                "no documents left to train on; the counts logged above say why rows were dropped"
            )
        self._check_not_empty()

    def num_packs(self, epoch: int) -> int:
        return len(self.plan(epoch))

    def documents_of_pack(self, epoch: int, index: int) -> NDArray[np.int64]:
        return self.used[self.plan(epoch)[index]]

    def first_window(self) -> tuple[NDArray[np.int64], NDArray[np.integer], Packs]:
        return self.used, self.lengths, self.plan(0)

    def plan(self, epoch: int) -> Packs:
        """Return the packs of an epoch; their indices are into `used`.

        Composer reads the number of batches once and holds every epoch to it. An epoch whose own
        plan has one batch more or less therefore gets the first epoch's packs in another order.
        """
        epoch = epoch if self.shuffle else 0
        if self._plan is not None and self._plan[0] == epoch:
            return self._plan[1]
        # A plan of 10 M documents is 100 MiB and takes seconds: keep one at a time, and make the
        # first epoch's again only if it is needed.
        first = self._plan[1] if self._plan is not None and self._plan[0] == 0 else None
        self._plan = None
        if not self.shuffle:
            self._plan = epoch, self._plan_in_order()
            return self._plan[1]
        packs = pack(self.lengths, self.capacity, seed=self.seed, epoch=epoch)
        efficiency = 100 * packs.packing_efficiency
        log.info("epoch %d: %d packs, %.2f %% full", epoch, len(packs), efficiency)
        if self._num_batches is not None and self._batches_of(len(packs)) != self._num_batches:
            del packs
            if first is None:
                first = pack(self.lengths, self.capacity, seed=self.seed, epoch=0)
            packs = reordered(first, np.random.default_rng((self.seed, epoch)))
        self._plan = epoch, packs
        return packs

    def _plan_in_order(self) -> Packs:
        packs = pack_in_order(self.lengths, self.capacity)
        log.info(
            "shuffle: false, documents in their order: %d packs, %.2f %% full; shuffled documents"
            " would fill about %d",
            *(len(packs), 100 * packs.packing_efficiency, -(-packs.num_tokens // self.capacity)),
        )
        return packs

    def plan_digest(self, epoch: int) -> str:
        packs = self.plan(epoch)
        return hashlib.sha256(packs.documents.tobytes() + packs.offsets.tobytes()).hexdigest()[:16]
