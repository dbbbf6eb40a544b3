"""Rows of tokens -> the table of documents; decides what is truncated, split or dropped."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from datasets.utils import tqdm
from numpy.typing import NDArray

from foundry_ext.data.documents import NUM_UNTRAINED
from foundry_ext.data.row_outcome import RowOutcome
from foundry_ext.data.token_columns import ENDS, IDS, ids_type, mask_ends
from foundry_ext.utils.errors import UserError


class Tokens(NamedTuple):
    """A row before truncation: ids [L] int32, and which of them are predicted, [L] bool."""

    input_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    num_untrained: int = 0
    """Responses of a chat that `target_responses` leaves out."""


class Record(NamedTuple):
    """A document, or the reason why a row has none."""

    tokens: Tokens
    outcome: RowOutcome
    num_truncated_tokens: int = 0
    """Tokens removed from the document, or dropped with it."""
    num_untrained: int = 0
    """Responses of the row that `target_responses` leaves out; 0 but in its first record."""


NO_TOKENS = Tokens(np.empty(0, np.int32), np.empty(0, np.bool_))


def to_records(index: int, tokens: Tokens, limit: int, overlong: str) -> Iterator[Record]:
    """Yield the documents of row `index`, at least one, of at most `limit` tokens each.

    `overlong` is that of TokenizeSettings.

    Raises:
        UserError: the row is too long under `overlong: error`.
    """
    size = len(tokens.input_ids)
    if size == 0:
        yield Record(NO_TOKENS, RowOutcome.DROPPED_EMPTY)
    elif size <= limit:
        yield _document(tokens, RowOutcome.KEPT)
    elif overlong == "error":
        raise UserError(
            f"row {index} has {size} tokens, more than max_seq_len {limit}; raise max_seq_len, or"
            " set overlong to truncate, split or drop"
        )
    elif overlong == "drop":
        yield Record(NO_TOKENS, RowOutcome.DROPPED_OVERLONG, size)
    elif overlong == "truncate":
        yield _document(_piece(tokens, 0, limit), RowOutcome.TRUNCATED, size - limit)
    else:
        for start in range(0, size, limit):
            yield _document(_piece(tokens, start, start + limit), RowOutcome.SPLIT)


def _piece(tokens: Tokens, start: int, end: int) -> Tokens:
    return Tokens(tokens.input_ids[start:end], tokens.loss_mask[start:end])


def _document(tokens: Tokens, outcome: RowOutcome, num_truncated_tokens: int = 0) -> Record:
    """Return a document, or a dropped one if it has no token to learn.

    Nothing precedes the first token to predict it, so its label does not count.
    """
    if not tokens.loss_mask[1:].any():
        return Record(
            NO_TOKENS, RowOutcome.DROPPED_NO_LOSS, num_truncated_tokens + len(tokens.input_ids)
        )
    return Record(tokens, outcome, num_truncated_tokens)


def to_table(
    records: Iterable[Record], *, max_id: int = 2**31 - 1, with_responses: bool = False
) -> pa.Table:
    """Return the columns of data/token_columns.py, built without a Python object per token.

    Args:
        records: the documents.
        max_id: the tokenizer's largest id.
        with_responses: add NUM_UNTRAINED, and the loss masks, which plain text does without.
    """
    tokens, outcomes, num_truncated_tokens, num_untrained = zip(*records, strict=True)
    offsets = np.cumsum([0, *(len(row.input_ids) for row in tokens)], dtype=np.int32)
    ids = pa.array(np.concatenate([row.input_ids for row in tokens]))
    columns = {
        IDS: pa.ListArray.from_arrays(offsets, ids.cast(ids_type(max_id))),
        "outcome": np.array(outcomes, dtype=np.int8),
        "num_cut": np.array(num_truncated_tokens, dtype=np.int32),
    }
    if with_responses:
        columns[ENDS] = mask_ends(np.concatenate([row.loss_mask for row in tokens]), offsets)
        columns[NUM_UNTRAINED] = np.array(num_untrained, dtype=np.int32)
    return pa.table(columns)


def write_table(
    path: Path, batches: Sequence[range], tables: Iterator[pa.Table], description: str
) -> None:
    """Write the tables of batches of rows, in order, as one Arrow stream, with a progress bar."""
    first = next(tables)
    with (
        tqdm(total=batches[-1].stop, unit=" rows", desc=description) as bar,
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_stream(sink, first.schema) as writer,
    ):
        for batch, table in zip(batches, chain([first], tables), strict=True):
            writer.write_table(table)
            bar.update(len(batch))
