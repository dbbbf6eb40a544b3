"""Simulated schedule of a run: the packs of every batch, and when Composer evaluates.

Documents, tokens and batches come from the sampler that trains. The clock and the intervals are
Composer's own, stepped without a model.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
from composer.core import Event, Time, Timestamp, TimeUnit
from composer.utils import create_interval_scheduler
from numpy.typing import NDArray

from foundry_ext.data.dataset import PackedDataset
from foundry_ext.data.documents import Documents
from foundry_ext.data.mixture import MixedDocuments
from foundry_ext.data.prepared.documents import PreparedDocuments
from foundry_ext.packing.sampler import PackedBatchSampler
from foundry_ext.training.meter import StepCounts
from foundry_ext.utils.errors import UserError

_UNITS = {TimeUnit.EPOCH, TimeUnit.BATCH, TimeUnit.TOKEN, TimeUnit.SAMPLE}


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Steps, tokens, evaluations and checkpoints of a run."""

    totals: StepCounts
    """Counts of all steps, without times."""
    steps: int
    batches_per_epoch: int
    epochs: float
    warmup_steps: int | None
    """Steps until t_warmup is over; None without a warm-up."""
    evaluated_at: list[int] = field(default_factory=list)
    """Steps after which Composer evaluates, without step 0 of eval_first."""
    saves: int = 0


def simulate_schedule(dataset: PackedDataset, config: dict[str, Any]) -> Schedule:
    """Simulate the batches and intervals of a run; `config` must be resolved.

    Raises:
        UserError: the duration cannot be converted to steps, such as seconds.
    """
    duration = Time.from_input(config["max_duration"], TimeUnit.EPOCH)
    if duration.unit not in _UNITS:
        raise UserError(
            f"max_duration: {config['max_duration']!r} cannot be planned; use ep, ba, tok or sp"
        )
    length = len(dataset.sampler)
    clock: Any = SimpleNamespace(
        timestamp=Timestamp(),
        previous_timestamp=None,
        max_duration=duration,
        dataloader_len=Time.from_batch(length),
    )
    clock.get_elapsed_duration = lambda: clock.timestamp.get(duration.unit) / duration
    evaluates = create_interval_scheduler(
        config.get("eval_interval", 1), checkpoint_events=False, final_events={Event.FIT_END}
    )
    saves = create_interval_scheduler(config.get("save_interval") or 0)
    is_warm = _warm(config.get("scheduler") or {}, duration, length)
    totals, warmup, num_saves = StepCounts(), None, 0
    evaluated: list[int] = []
    for event, batch in _events(dataset, clock):
        step = clock.timestamp.batch.value
        if batch is not None:
            totals += batch
            if warmup is None and is_warm is not None and is_warm(clock.timestamp):
                warmup = step
        if evaluates(clock, event) and evaluated[-1:] != [step]:
            evaluated.append(step)
        num_saves += saves(clock, event)
    return Schedule(
        totals=totals,
        steps=clock.timestamp.batch.value,
        batches_per_epoch=length,
        epochs=clock.timestamp.batch.value / length,
        warmup_steps=warmup,
        evaluated_at=evaluated,
        saves=num_saves if config.get("save_folder") else 0,
    )


def _warm(
    scheduler: dict[str, Any], duration: Time, length: int
) -> Callable[[Timestamp], bool] | None:
    """Return a predicate of the warm-up's end, t_warmup read as Composer reads it, or None."""
    if scheduler.get("t_warmup") is None:
        return None
    warmup = Time.from_input(scheduler["t_warmup"], TimeUnit.EPOCH)
    if warmup.unit == TimeUnit.DURATION and duration.unit != TimeUnit.EPOCH:
        warmup = Time(int(warmup.value * duration.value), duration.unit)
    elif warmup.unit in (TimeUnit.DURATION, TimeUnit.EPOCH):
        epochs = duration.value if warmup.unit == TimeUnit.DURATION else 1
        warmup = Time(int(warmup.value * epochs * length), TimeUnit.BATCH)
    return lambda timestamp: timestamp.get(warmup.unit) >= warmup


def _events(dataset: PackedDataset, clock: Any) -> Iterator[tuple[Event, StepCounts | None]]:
    """Yield the events at which Composer asks its intervals, with the clock set to match.

    The first event of a step also yields the step's batch.
    """
    prepared = isinstance(dataset.documents, PreparedDocuments)
    counts = MeanCounts(dataset) if prepared else PackCounts(dataset)
    while clock.timestamp < clock.max_duration:
        batches = counts.batches(int(clock.timestamp.epoch))
        for position, batch in enumerate(batches, 1):
            clock.previous_timestamp = clock.timestamp
            clock.timestamp = clock.timestamp.to_next_batch(
                samples=batch.documents, tokens=batch.real_tokens
            )
            yield Event.BATCH_END, batch
            yield Event.BATCH_CHECKPOINT, None
            is_over = clock.timestamp >= clock.max_duration
            if position == len(batches):
                clock.previous_timestamp = clock.timestamp
                clock.timestamp = clock.timestamp.to_next_epoch()
                yield Event.EPOCH_END, None
                yield Event.EPOCH_CHECKPOINT, None
            if is_over:
                break
    yield Event.FIT_END, None


class PackCounts:
    """Sums over the packs of any epoch; each document is read once."""

    def __init__(self, dataset: PackedDataset):
        sampler, documents = dataset.sampler, dataset.documents
        assert isinstance(sampler, PackedBatchSampler)
        assert isinstance(documents, Documents | MixedDocuments)
        self.sampler, self.fixed_shape = sampler, dataset.collator.fixed_shape
        used = sampler.used
        self.lengths = np.asarray(documents.lengths, dtype=np.int64)[used]
        # Nothing precedes a document's first token to predict it.
        self.labelled = np.array(
            [np.count_nonzero(document.loss_mask[1:]) for document in documents.read(used)],
            dtype=np.int64,
        )

    def batches(self, epoch: int) -> list[StepCounts]:
        """Return the global batches of an epoch."""
        packs = self.sampler.plan(epoch)
        order, starts = packs.documents, packs.offsets[:-1]
        size = self.sampler.batch_packs * self.sampler.num_replicas
        batch_starts = np.arange(0, len(packs), size)

        def sums(values: NDArray[np.int64]) -> NDArray[np.int64]:
            return np.add.reduceat(np.add.reduceat(values[order], starts), batch_starts)

        real_tokens, num_packs = sums(self.lengths), np.minimum(size, len(packs) - batch_starts)
        padded = np.full_like(real_tokens, size * self.sampler.capacity)
        columns = {
            "real_tokens": real_tokens,
            "loss_tokens": sums(self.labelled),
            "documents": sums(np.ones_like(self.lengths)),
            "packs": num_packs,
            # An empty pack has one token.
            "slots": padded if self.fixed_shape else real_tokens + size - num_packs,
            "sum_squared_lengths": sums(self.lengths**2),
        }
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        batches = [StepCounts(**dict(zip(columns, row, strict=True))) for row in rows]
        return batches[: len(self.sampler)]  # drop_last


class MeanCounts:
    """Batches of the mean counts of an epoch, for prepared data, which is too large to read."""

    def __init__(self, dataset: PackedDataset):
        documents, sampler = dataset.documents, dataset.sampler
        assert isinstance(documents, PreparedDocuments)
        size = sampler.batch_packs * sampler.num_replicas
        self.length = batches = sampler.num_batches(0)
        real_tokens = round(documents.num_tokens / batches)
        is_fixed = dataset.collator.fixed_shape
        self.mean = StepCounts(
            real_tokens=real_tokens,
            loss_tokens=round(documents.count_loss_tokens() / batches),
            documents=round(dataset.num_documents / batches),
            packs=round(sampler.num_packs(0) / batches),
            slots=size * sampler.capacity if is_fixed else real_tokens,
            sum_squared_lengths=round(documents.census.num_squared / batches),
        )

    def batches(self, epoch: int) -> list[StepCounts]:
        """Return the global batches of an epoch."""
        return [self.mean] * self.length
