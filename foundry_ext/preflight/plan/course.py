"""A run's steps before it runs: the packs of every batch, and when Composer would evaluate.

Tokens, documents and batches are those of the sampler that trains; the clock is Composer's own, and
so are its intervals, walked over without a model.
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
from foundry_ext.utils.errors import UserError

_UNITS = {TimeUnit.EPOCH, TimeUnit.BATCH, TimeUnit.TOKEN, TimeUnit.SAMPLE}


@dataclass
class Totals:
    """Sums over some packs, or batches; one of each key for a pack where it is an array."""

    documents: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    num_computed_tokens: int = 0
    """Tokens computed, filled ones included."""
    packs: int = 0
    sum_squared_lengths: int = 0

    def add(self, other: "Totals") -> None:
        for key, value in vars(other).items():
            setattr(self, key, getattr(self, key) + value)


@dataclass(frozen=True, kw_only=True)
class Course:
    """What a run does from its first batch to its last."""

    totals: Totals
    steps: int
    batches_per_epoch: int
    epochs: float
    capacity: int
    warmup_steps: int | None
    """Of the schedule's t_warmup; None without one."""
    evaluated_at: list[int] = field(default_factory=list)
    """Steps after which Composer evaluates, 0 for eval_first left out."""
    saves: int = 0

    @property
    def packing_efficiency(self) -> float:
        return self.totals.tokens / (self.totals.packs * self.capacity)


def follow(dataset: PackedDataset, config: dict[str, Any]) -> Course:
    """Walks through a run.

    Args:
        config: resolved; max_duration, eval_interval, save_interval and the scheduler are read.

    Raises:
        UserError: a duration that no one knows beforehand, such as seconds.
    """
    duration = Time.from_input(config["max_duration"], TimeUnit.EPOCH)
    if duration.unit not in _UNITS:
        raise UserError(
            f"max_duration: {config['max_duration']!r} cannot be planned; give ep, ba, tok or sp"
        )
    length = len(dataset.sampler)
    clock: Any = SimpleNamespace(
        timestamp=Timestamp(),
        previous_timestamp=None,
        max_duration=duration,
        dataloader_len=Time.from_batch(length),
    )
    clock.get_elapsed_duration = lambda: clock.timestamp.get(duration.unit) / duration
    evaluates = _interval(config.get("eval_interval", 1), evaluation=True)
    saves = _interval(config.get("save_interval") or 0)
    is_warm = _warm(config.get("scheduler") or {}, duration, length)
    totals, warmup, num_saves = Totals(), None, 0
    evaluated: list[int] = []
    for event, batch in _events(dataset, clock):
        step = clock.timestamp.batch.value
        if batch is not None:
            totals.add(batch)
            if warmup is None and is_warm is not None and is_warm(clock.timestamp):
                warmup = step
        if evaluates(clock, event) and evaluated[-1:] != [step]:
            evaluated.append(step)
        num_saves += saves(clock, event)
    return Course(
        totals=totals,
        steps=clock.timestamp.batch.value,
        batches_per_epoch=length,
        epochs=clock.timestamp.batch.value / length,
        capacity=dataset.sampler.capacity,
        warmup_steps=warmup,
        evaluated_at=evaluated,
        saves=num_saves if config.get("save_folder") else 0,
    )


def _interval(interval: Any, *, evaluation: bool = False) -> Callable[[Any, Event], bool]:
    if not evaluation:
        return create_interval_scheduler(interval)
    return create_interval_scheduler(
        interval, checkpoint_events=False, final_events={Event.FIT_END}
    )


def _warm(
    scheduler: dict[str, Any], duration: Time, length: int
) -> Callable[[Timestamp], bool] | None:
    """Whether the warm-up is over, t_warmup read as Composer does; None where there is none."""
    if scheduler.get("t_warmup") is None:
        return None
    warmup = Time.from_input(scheduler["t_warmup"], TimeUnit.EPOCH)
    if warmup.unit == TimeUnit.DURATION and duration.unit != TimeUnit.EPOCH:
        warmup = Time(int(warmup.value * duration.value), duration.unit)
    elif warmup.unit in (TimeUnit.DURATION, TimeUnit.EPOCH):
        epochs = duration.value if warmup.unit == TimeUnit.DURATION else 1
        warmup = Time(int(warmup.value * epochs * length), TimeUnit.BATCH)
    return lambda timestamp: timestamp.get(warmup.unit) >= warmup


def _events(dataset: PackedDataset, clock: Any) -> Iterator[tuple[Event, Totals | None]]:
    """Composer's events at which intervals are asked, its clock set as it then is; with the first
    one of a step the step's batch."""
    counts = PackCounts(dataset)
    while clock.timestamp < clock.max_duration:
        batches = counts.batches(int(clock.timestamp.epoch))
        for number, batch in enumerate(batches, 1):
            clock.previous_timestamp = clock.timestamp
            clock.timestamp = clock.timestamp.to_next_batch(
                samples=batch.documents, tokens=batch.tokens
            )
            yield Event.BATCH_END, batch
            yield Event.BATCH_CHECKPOINT, None
            is_over = clock.timestamp >= clock.max_duration
            if number == len(batches):
                clock.previous_timestamp = clock.timestamp
                clock.timestamp = clock.timestamp.to_next_epoch()
                yield Event.EPOCH_END, None
                yield Event.EPOCH_CHECKPOINT, None
            if is_over:
                break
    yield Event.FIT_END, None


class PackCounts:
    """Sums over the packs of any epoch, without reading a document twice."""

    def __init__(self, dataset: PackedDataset):
        self.sampler, self.fixed_shape = dataset.sampler, dataset.collator.fixed_shape
        documents, used = dataset.documents, dataset.sampler.used
        self.lengths = np.asarray(documents.lengths, dtype=np.int64)[used]
        # Nothing comes before a document's first token to predict it.
        self.labelled = np.array(
            [np.count_nonzero(one.loss_mask[1:]) for one in documents.read(used)], dtype=np.int64
        )

    def batches(self, epoch: int) -> list[Totals]:
        """The global batches of an epoch."""
        packs = self.sampler.plan(epoch)
        order, starts = packs.documents, packs.offsets[:-1]
        size = self.sampler.batch_packs * self.sampler.num_replicas

        def sums(values: NDArray[np.int64]) -> list[int]:
            """Of each batch."""
            per_pack = np.add.reduceat(values[order], starts)
            return np.add.reduceat(per_pack, np.arange(0, len(per_pack), size)).tolist()

        columns = zip(
            sums(np.ones_like(self.lengths)),
            sums(self.lengths),
            sums(self.labelled),
            sums(self.lengths**2),
            strict=True,
        )
        found = []
        for number, (documents, tokens, labelled, squares) in enumerate(columns):
            num_packs = min(size, len(packs) - number * size)
            num_computed = (
                size * self.sampler.capacity if self.fixed_shape else tokens + size - num_packs
            )
            found.append(Totals(documents, tokens, labelled, num_computed, num_packs, squares))
        return found[: len(self.sampler)]  # drop_last
