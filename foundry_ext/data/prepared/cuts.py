"""Rows -> documents by arithmetic on sizes: what `max_seq_len` and `overlong` make of a shard.

The results are those of tokenising with these settings, see data/table.py.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foundry_ext.data.prepared.shard import RowSizes
from foundry_ext.data.row_outcome import RowOutcome


@dataclass(frozen=True)
class Cuts:
    """The documents of a shard: pieces of its rows.

    Attributes:
        rows: [n] row of each document.
        starts: [n] its first token in the row.
        lengths: [n] its tokens; 0 for a dropped one.
        outcomes: [n] int8, values of `RowOutcome`.
        num_truncated_tokens: [n] tokens removed from the document, or dropped with it.
    """

    rows: NDArray[np.int32]
    starts: NDArray[np.int32]
    lengths: NDArray[np.int32]
    outcomes: NDArray[np.int8]
    num_truncated_tokens: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.rows)


def cut_rows(sizes: RowSizes, max_seq_len: int, overlong: str) -> Cuts:
    """Return the documents of rows.

    Args:
        sizes: of the rows.
        max_seq_len: most tokens of a document.
        overlong: truncate, split or drop. Rows are split only where every token is predicted,
            because sizes do not tell in which pieces a token is.
    """
    whole = sizes.lengths.astype(np.int64)
    if overlong == "split":
        return _split(whole, max_seq_len)
    too_long = whole > max_seq_len
    lengths = np.minimum(whole, max_seq_len)
    outcomes = np.where(too_long, RowOutcome.TRUNCATED, RowOutcome.KEPT)
    if overlong == "drop":
        lengths = np.where(too_long, 0, lengths)
        outcomes = np.where(too_long, RowOutcome.DROPPED_OVERLONG, outcomes)
    has_no_loss = (sizes.first_loss >= lengths) & (lengths > 0)
    outcomes[has_no_loss] = RowOutcome.DROPPED_NO_LOSS
    outcomes[whole == 0] = RowOutcome.DROPPED_EMPTY
    lengths[has_no_loss] = 0
    return Cuts(
        rows=np.arange(len(whole), dtype=np.int32),
        starts=np.zeros(len(whole), dtype=np.int32),
        lengths=lengths.astype(np.int32),
        outcomes=outcomes.astype(np.int8),
        num_truncated_tokens=(whole - lengths).astype(np.int32),
    )


def _split(whole: NDArray[np.int64], max_seq_len: int) -> Cuts:
    counts = np.maximum(1, -(-whole // max_seq_len))
    rows = np.repeat(np.arange(len(whole)), counts)
    ends = np.cumsum(counts)
    number = np.arange(len(rows)) - np.repeat(ends - counts, counts)
    starts = number * max_seq_len
    lengths = np.minimum(whole[rows] - starts, max_seq_len)
    outcomes = np.where(counts[rows] > 1, RowOutcome.SPLIT, RowOutcome.KEPT)
    has_no_loss = lengths == 1  # nothing precedes its only token
    outcomes[has_no_loss] = RowOutcome.DROPPED_NO_LOSS
    outcomes[whole[rows] == 0] = RowOutcome.DROPPED_EMPTY
    return Cuts(
        rows=rows.astype(np.int32),
        starts=starts.astype(np.int32),
        lengths=np.where(has_no_loss, 0, lengths).astype(np.int32),
        outcomes=outcomes.astype(np.int8),
        num_truncated_tokens=has_no_loss.astype(np.int32),
    )
