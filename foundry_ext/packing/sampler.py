"""Packs -> the batches of one rank and epoch; a walk over a plan, nothing carried over.

The plan is a pure function of (lengths, capacity, seed, epoch) and knows nothing of ranks. A global
batch is `batch_packs` packs on each of `world_size` ranks, which take packs in turn; the last one
is completed with empty packs, so that every rank has the same number of batches and microbatches.

Example, 2 ranks of 1 pack, packs A B C: rank 0 gets [A] [C], rank 1 gets [B] [empty].
"""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset, DistributedSampler

from foundry_ext.packing.algorithm import Packs, pack
from foundry_ext.utils.errors import UserError

log = logging.getLogger(__name__)

_EMPTY = np.empty(0, dtype=np.int64)


class PackedBatchSampler(DistributedSampler):
    """A batch sampler: yields lists of packs, each an int64 array of document indices.

    It is a DistributedSampler because that is how Composer recognises a sampler that shares data
    out over ranks; Composer then calls `set_epoch` before every epoch. Composer also takes
    `total_size - len(dataset)` samples for padding and cuts them off in evaluation; here the two
    are equal, for an empty pack holds no sample.
    """

    def __init__(
        self,
        dataset: Dataset,
        lengths: NDArray[np.integer],
        *,
        capacity: int,
        batch_packs: int,
        rank: int,
        world_size: int,
        shuffle: bool,
        seed: int,
        drop_last: bool = False,
    ):
        """
        Args:
            dataset: `len` is the number of documents.
            lengths: tokens of each document; 0 for one that is not to be used.
            capacity: tokens a pack may hold.
            batch_packs: packs of a batch on this rank.
            shuffle: another plan every epoch; else one and the same.
            drop_last: leave out a last incomplete global batch, which is logged.

        Raises:
            UserError: no documents, or too few for one whole batch with `drop_last`.
        """
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed)
        self.total_size = len(dataset)  # pyright: ignore[reportArgumentType]
        self.used = np.flatnonzero(lengths)
        self.lengths = np.asarray(lengths)[self.used]
        self.capacity, self.batch_packs = capacity, batch_packs
        self.drop_last = drop_last
        self._resume_at = 0, 0  # epoch, batch
        self._plan: tuple[int, Packs] | None = None
        self._num_batches: int | None = None
        if len(self.used) == 0:
            raise UserError("no document is left to train on: see the counts of the data above")
        if len(self) == 0:
            raise UserError(
                f"{len(self.plan(0))} packs do not fill one global batch of"
                f" {batch_packs} x {world_size}; lower the batch size, or set drop_last: false"
            )

    def plan(self, epoch: int) -> Packs:
        """The packs of an epoch; indices are into the used documents.

        Composer takes the number of batches once and holds every epoch to it, so an epoch whose own
        plan needs one batch more or less gets the first epoch's packs in another order instead.
        """
        epoch = epoch if self.shuffle else 0
        if self._plan is not None and self._plan[0] == epoch:
            return self._plan[1]
        # A plan of 10 M documents is 100 MiB and takes seconds, so none is kept or made in vain.
        first = self._plan[1] if self._plan is not None and self._plan[0] == 0 else None
        self._plan = None
        packs = pack(self.lengths, self.capacity, seed=self.seed, epoch=epoch)
        log.info(
            "epoch %d: %d packs, %.2f %% full", epoch, len(packs), 100 * packs.packing_efficiency
        )
        if self._num_batches is not None and self._batches_of(packs) != self._num_batches:
            del packs
            if first is None:
                first = pack(self.lengths, self.capacity, seed=self.seed, epoch=0)
            packs = _reordered(first, np.random.default_rng((self.seed, epoch)))
        self._plan = epoch, packs
        return packs

    def plan_digest(self, epoch: int) -> str:
        """Of the packs of an epoch, to tell whether another run has the same ones."""
        packs = self.plan(epoch)
        return hashlib.sha256(packs.documents.tobytes() + packs.offsets.tobytes()).hexdigest()[:16]

    def _batches_of(self, packs: Packs) -> int:
        whole, rest = divmod(len(packs), self.batch_packs * self.num_replicas)
        return whole if self.drop_last else whole + bool(rest)

    def __len__(self) -> int:
        """Batches of every epoch, the same on every rank."""
        if self._num_batches is None:
            self._num_batches = self._batches_of(self.plan(0))
        return self._num_batches

    def resume_at(self, *, epoch: int, batch: int) -> None:
        """The next iteration, if over this epoch, starts at this batch; any other one at 0."""
        self.epoch = epoch
        self._resume_at = epoch, batch

    @property
    def first_batch(self) -> int:
        """Where the next iteration starts.

        Stopped by `max_duration` right after an epoch's last batch, Composer saves that batch's
        number and has its clock in the next epoch already, which is to start at 0.
        """
        epoch, batch = self._resume_at
        return batch if epoch == self.epoch else 0

    def __iter__(self) -> Iterator[list[NDArray[np.int64]]]:
        first, self._resume_at = self.first_batch, (0, 0)
        for batch in range(first, len(self)):
            yield self.batch(batch)

    def batch(self, number: int) -> list[NDArray[np.int64]]:
        """This rank's packs of batch `number`, found without reading any other."""
        packs = self.plan(self.epoch)
        start = number * self.batch_packs * self.num_replicas + self.rank
        numbers = range(start, start + self.batch_packs * self.num_replicas, self.num_replicas)
        return [self.used[packs[i]] if i < len(packs) else _EMPTY for i in numbers]


def _reordered(packs: Packs, rng: np.random.Generator) -> Packs:
    """The same packs in another order; no Python object a pack, of which there may be millions."""
    order = rng.permutation(len(packs))
    sizes = np.diff(packs.offsets)[order]
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    index = np.repeat(packs.offsets[:-1][order] - offsets[:-1], sizes)
    index += np.arange(len(index))
    return replace(packs, documents=packs.documents[index], offsets=offsets)
