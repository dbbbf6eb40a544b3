"""Tokens of rows -> the table of documents: what is cut, split or dropped is decided here."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from foundry_ext.data.documents import FEATURES, Outcome
from foundry_ext.utils.errors import UserError


class Tokens(NamedTuple):
    """Of a row, before any cut: ids [L] int32, and which of them are to be predicted [L] bool."""

    input_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]


class Record(NamedTuple):
    """A document, or its absence: no tokens, and why."""

    tokens: Tokens
    outcome: Outcome
    num_truncated_tokens: int = 0
    """Tokens that are left out of the document or with it."""


NO_TOKENS = Tokens(np.empty(0, np.int32), np.empty(0, np.bool_))


def to_records(index: int, tokens: Tokens, limit: int, overlong: str) -> Iterator[Record]:
    """The documents of row `index`, at least one, of at most `limit` tokens.

    Args:
        overlong: as in TokenizeSettings.

    Raises:
        UserError: too long under `overlong: error`.
    """
    size = len(tokens.input_ids)
    if size == 0:
        yield Record(NO_TOKENS, Outcome.DROPPED_EMPTY)
    elif size <= limit:
        yield _kept(tokens, Outcome.KEPT)
    elif overlong == "error":
        raise UserError(
            f"row {index} has {size} tokens, more than max_seq_len {limit}; raise max_seq_len, or"
            " set overlong to truncate, split or drop"
        )
    elif overlong == "drop":
        yield Record(NO_TOKENS, Outcome.DROPPED_OVERLONG, size)
    elif overlong == "truncate":
        yield _kept(_piece(tokens, 0, limit), Outcome.TRUNCATED, size - limit)
    else:
        for start in range(0, size, limit):
            yield _kept(_piece(tokens, start, start + limit), Outcome.SPLIT)


def _piece(tokens: Tokens, start: int, end: int) -> Tokens:
    return Tokens(tokens.input_ids[start:end], tokens.loss_mask[start:end])


def _kept(tokens: Tokens, outcome: Outcome, num_truncated_tokens: int = 0) -> Record:
    """A document, or its absence where no token of it could be learned.

    The first token is predicted by nothing, so its label does not count.
    """
    if not tokens.loss_mask[1:].any():
        return Record(
            NO_TOKENS, Outcome.DROPPED_NO_LOSS, num_truncated_tokens + len(tokens.input_ids)
        )
    return Record(tokens, outcome, num_truncated_tokens)


def to_table(records: Iterable[Record]) -> pa.Table:
    """Columns of `FEATURES`, straight from arrays: no Python object a token."""
    tokens, outcomes, num_truncated_tokens = zip(*records, strict=True)
    offsets = np.cumsum([0, *(len(one.input_ids) for one in tokens)], dtype=np.int32)
    columns = {
        "input_ids": pa.ListArray.from_arrays(
            offsets, np.concatenate([one.input_ids for one in tokens])
        ),
        "has_loss": pa.ListArray.from_arrays(
            offsets, np.concatenate([one.loss_mask for one in tokens]).view(np.uint8)
        ),
        "outcome": np.array(outcomes, dtype=np.int8),
        "num_cut": np.array(num_truncated_tokens, dtype=np.int32),
    }
    return pa.table(columns, schema=FEATURES.arrow_schema)
