"""The documents of an epoch padded, unpadded and packed: what each layout computes.

Padded and unpadded microbatches have a fixed number of documents, as many as a pack has on average,
in an order of their own: random, or the file's with `shuffle: false`. A padded microbatch has a row
for each document, as wide as the longest of them. An unpadded one has their tokens end to end. A
pack has up to `pack_tokens` tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from foundry_ext.data.dataset import PackedDataset
from foundry_ext.data.prepared.documents import PreparedDocuments

MOST_LINES = 200
"""Most lines that are drawn of a layout."""


@dataclass(frozen=True)
class Segment:
    """A document's tokens in one line of a drawing, in slots from its left."""

    document: int
    """Place of the document among those drawn."""
    start: int
    length: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Counts of one layout over the first epoch, and a drawing of its first microbatch."""

    name: str
    num_tokens: int
    num_slots: int
    """Slots that are computed: tokens and padding."""
    sum_squared_lengths: int
    """Squared lengths of the sequences that attention computes: documents, or whole padded rows."""
    largest: int
    """Slots of the largest microbatch, which the memory must hold."""
    smallest: int
    """Slots of the smallest one, without the last, which may be a remainder."""
    num_microbatches: int
    drawn_slots: int
    """Slots of the first microbatch, which is drawn."""
    lines: list[list[Segment]]
    """Lines of the drawing."""
    line_slots: int | None = None
    """Computed slots of each line; None if only its tokens are computed."""
    capacity: int = 0
    """Slots that a pack may have."""
    tokens_per_second: float | None = None
    """Real tokens per second, predicted; None if that cannot be predicted here."""
    speed: float | None = None
    """Real tokens per second over those of the padded layout, predicted."""

    @property
    def wasted_share(self) -> float:
        """Computed slots without a token, over all computed slots."""
        return 1 - self.num_tokens / self.num_slots

    @property
    def mean_fill(self) -> float:
        """Tokens of a mean microbatch over the slots of the largest one."""
        return self.num_tokens / (self.num_microbatches * self.largest)


@dataclass(frozen=True)
class Layouts:
    width: int
    """Slots of a line in all drawings: tokens of the longest document that is drawn."""
    per_microbatch: int
    """Documents of a padded or unpadded microbatch."""
    layouts: list[Layout]
    scope: str = "the whole epoch"
    """The documents that are counted."""
    why_no_speed: str = ""
    device: str = ""
    """Processor of the predicted tokens per second, and how its speed is known."""

    def with_speeds(
        self, speeds: Sequence[float], tokens_per_second: float | None, device: str
    ) -> "Layouts":
        """Return these layouts with speeds over the padded one's and rates in tokens per second.

        `tokens_per_second` is the packed layout's, or None.
        """
        packed = speeds[-1]
        layouts = [
            replace(
                layout,
                speed=speed,
                tokens_per_second=tokens_per_second and tokens_per_second * speed / packed,
            )
            for layout, speed in zip(self.layouts, speeds, strict=True)
        ]
        return replace(self, layouts=layouts, device=device)


def lay_out(dataset: PackedDataset) -> Layouts:
    """Count the three layouts of a data set's first epoch, or of its first window."""
    sampler = dataset.sampler
    _, found, plan = sampler.first_window()
    lengths = np.asarray(found, dtype=np.int64)
    count = max(1, round(len(lengths) / len(plan)))
    order = np.arange(len(lengths))
    if sampler.shuffle:
        order = np.random.default_rng(sampler.seed).permutation(len(lengths))
    batches = np.split(lengths[order], range(count, len(lengths), count))
    packs = [lengths[plan[index]] for index in range(len(plan))]
    width = int(max(batches[0].max(), packs[0].max()))
    fixed = sampler.capacity if dataset.collator.fixed_shape else None
    squares = int((lengths**2).sum())
    wide = [(len(batch), int(batch.max())) for batch in batches]
    is_prepared = isinstance(dataset.documents, PreparedDocuments)
    return Layouts(
        width=width,
        scope="the first window of shards" if is_prepared else Layouts.scope,
        per_microbatch=count,
        layouts=[
            Layout(
                name="padded",
                sum_squared_lengths=sum(rows * longest**2 for rows, longest in wide),
                lines=[[Segment(i, 0, int(length))] for i, length in enumerate(batches[0])],
                line_slots=wide[0][1],
                **_counts(lengths, [rows * longest for rows, longest in wide]),
            ),
            Layout(
                name="unpadded",
                sum_squared_lengths=squares,
                lines=wrap(batches[0], width),
                **_counts(lengths, [int(batch.sum()) for batch in batches]),
            ),
            Layout(
                name="packed",
                sum_squared_lengths=squares,
                lines=wrap(packs[0], width),
                capacity=sampler.capacity,
                **_counts(lengths, [fixed or int(pack.sum()) for pack in packs]),
            ),
        ],
    )


def _counts(lengths: NDArray[np.int64], slots: Sequence[int]) -> dict[str, int]:
    """Return the counts of an epoch whose microbatches compute these slots."""
    return {
        "num_tokens": int(lengths.sum()),
        "num_slots": sum(slots),
        "largest": max(slots),
        "smallest": min(slots[:-1] or slots),  # the last one may be a remainder
        "drawn_slots": slots[0],
        "num_microbatches": len(slots),
    }


def wrap(lengths: Sequence[int] | NDArray[np.int64], width: int) -> list[list[Segment]]:
    """Lay documents end to end and break them into lines of `width` slots.

    Example: lengths 3 and 2 at width 4 are the lines [3 of the first, 1 of the second] and [1 of
    the second].
    """
    lines: list[list[Segment]] = [[]]
    at = 0
    for document, length in enumerate(map(int, lengths)):
        while length:
            if at == width:
                lines.append([])
                at = 0
            part = min(length, width - at)
            lines[-1].append(Segment(document, at, part))
            at, length = at + part, length - part
    return lines
