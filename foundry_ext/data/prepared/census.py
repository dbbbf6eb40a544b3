"""Counts of all documents of prepared data, from the sizes of its rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foundry_ext.data.prepared.plan_cache import planned
from foundry_ext.data.prepared.source import PreparedSource
from foundry_ext.data.row_outcome import RowOutcome

_PARTS = 8  # that ranks share out


@dataclass(frozen=True, eq=False)
class Census:
    """Counts of one pass over a source.

    Attributes:
        outcomes: [RowOutcome] documents of each outcome.
        num_truncated_tokens: tokens removed from documents, or dropped with them.
        num_untrained: responses of chats that `target_responses` leaves out.
        lengths: [max_seq_len + 1] documents of each length, without those that were dropped.
    """

    outcomes: NDArray[np.number]
    num_truncated_tokens: float
    num_untrained: float
    lengths: NDArray[np.number]

    @property
    def num_documents(self) -> int:
        return round(float(self.lengths.sum()))

    @property
    def num_tokens(self) -> int:
        return round(float(self.lengths @ np.arange(len(self.lengths))))

    @property
    def longest(self) -> int:
        """Tokens of the longest document; 0 if there is none."""
        return int(np.flatnonzero(self.lengths).max(initial=0))

    @property
    def num_squared(self) -> int:
        """Squared tokens of all documents, which their attention costs."""
        return round(float(self.lengths @ np.arange(len(self.lengths)) ** 2))

    @property
    def counts(self) -> dict[str, int]:
        """As `counts` of `Documents`."""
        named = {kind.name.lower(): round(float(self.outcomes[kind])) for kind in RowOutcome}
        named["tokens_cut"] = round(self.num_truncated_tokens)
        if self.num_untrained:
            named["responses_not_trained"] = round(self.num_untrained)
        return named


def merge_censuses(censuses: Sequence[Census], passes: Sequence[float]) -> Census:
    """Return the mean counts of so many passes over each source, which are fractions."""
    most = max(len(census.lengths) for census in censuses)
    pairs = list(zip(censuses, passes, strict=True))
    padded = [np.pad(one.lengths, (0, most - len(one.lengths))) * times for one, times in pairs]
    return Census(
        outcomes=np.sum([one.outcomes * times for one, times in pairs], axis=0),
        num_truncated_tokens=sum(one.num_truncated_tokens * times for one, times in pairs),
        num_untrained=sum(one.num_untrained * times for one, times in pairs),
        lengths=np.sum(padded, axis=0),
    )


def take_census(source: PreparedSource, name: str) -> Census:
    """Count the documents of a source. All ranks call it together."""
    index = source.index
    deciding = ["census", index.fingerprint, source.max_seq_len, source.overlong]
    num_outcomes = len(RowOutcome)
    width = num_outcomes + 1 + source.max_seq_len + 1
    parts = np.array_split(np.arange(len(index.shards)), min(len(index.shards), _PARTS))
    rows = planned(
        deciding,
        len(parts),
        width,
        lambda part: _count(source, parts[part].tolist()),
        name=f"Counting {name}",
        unit="parts",
    ).sum(axis=0)
    return Census(
        outcomes=rows[:num_outcomes],
        num_truncated_tokens=int(rows[num_outcomes]),
        num_untrained=sum(shard.num_untrained for shard in index.shards),
        lengths=rows[num_outcomes + 1 :],
    )


def _count(source: PreparedSource, shards: Sequence[int]) -> list[int]:
    outcomes = np.zeros(len(RowOutcome), dtype=np.int64)
    lengths = np.zeros(source.max_seq_len + 1, dtype=np.int64)
    num_truncated = 0
    for shard in shards:
        cuts = source.cuts(shard)
        outcomes += np.bincount(cuts.outcomes, minlength=len(outcomes))
        lengths += np.bincount(cuts.lengths, minlength=len(lengths))
        num_truncated += int(cuts.num_truncated_tokens.sum(dtype=np.int64))
    lengths[0] = 0
    return [*outcomes.tolist(), num_truncated, *lengths.tolist()]
