"""A shard: tokenised rows in one file, in the format of mosaicml-streaming (MDS).

Sample i of the file is row i, uncut: `max_seq_len` and `overlong` decide in training, so they can
change without tokenising again. A row without tokens is an empty sample, so it is counted.

| column | encoding | content |
|---|---|---|
| `ids` | bytes | token ids, uint16 or int32 by the tokenizer's largest id, little-endian |
| `loss` | bytes | a bit per token, 1 if it is predicted, lowest first; zeros fill 4 bytes |

Plain text, all of which is predicted, has no column `loss`. `StreamingDataset` reads these files,
one row at a time. `Shard` reads many rows at once: its cost is per token, which matters for short
ones.
"""

import json
import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import xxhash
from numpy.typing import NDArray
from streaming import MDSWriter

from foundry_ext.data.table import Tokens
from foundry_ext.utils.errors import UserError

_HASH = "xxh3_64"
# RowSizes.first_loss of a row that has none.
NEVER = np.iinfo(np.uint32).max


class FlatTokens(NamedTuple):
    """Documents end to end."""

    input_ids: NDArray[np.integer]
    """[T] token ids."""
    loss_mask: NDArray[np.bool_]
    """[T] whether a token is predicted."""


@dataclass(frozen=True)
class RowSizes:
    """Sizes of the rows of a shard: all that a plan needs.

    Attributes:
        lengths: [n] uint32 tokens of each row.
        first_loss: [n] uint32 position of the first predicted token from position 1 on, because
            nothing precedes the first one; or the largest number if there is none.
    """

    lengths: NDArray[np.uint32]
    first_loss: NDArray[np.uint32]

    @staticmethod
    def of(rows: Iterable[Tokens]) -> "RowSizes":
        rows = list(rows)
        lengths = np.array([len(row.input_ids) for row in rows], dtype=np.uint32)
        return RowSizes(lengths, np.array([_first_loss(row) for row in rows], dtype=np.uint32))


def _first_loss(row: Tokens) -> int:
    mask = row.loss_mask[1:]
    position = int(mask.argmax()) if len(mask) else 0
    return position + 1 if len(mask) and mask[position] else NEVER


def write_shard(
    folder: Path, rows: Iterable[Tokens], *, ids: str, with_loss: bool
) -> dict[str, Any]:
    """Write rows as `shard.00000.mds` into a folder, and return its description.

    Equal rows make equal bytes.

    Args:
        folder: an empty folder, or none yet; the file and its index.json are written there.
        rows: at least one.
        ids: type of the ids, uint16 or int32.
        with_loss: write the column `loss`; otherwise every token is predicted.

    Returns:
        The shard's entry in index.json: sizes, hash and columns.
    """
    columns = {"ids": "bytes"} | ({"loss": "bytes"} if with_loss else {})
    with MDSWriter(out=str(folder), columns=columns, hashes=[_HASH], size_limit=None) as writer:
        for row in rows:
            sample = {"ids": row.input_ids.astype(f"<{np.dtype(ids).str[1:]}").tobytes()}
            if with_loss:
                sample["loss"] = _pack_bits(row.loss_mask)
            writer.write(sample)
    return json.loads((folder / "index.json").read_text(encoding="utf-8"))["shards"][0]


def _pack_bits(mask: NDArray[np.bool_]) -> bytes:
    data = np.packbits(mask, bitorder="little").tobytes()
    return data + bytes(-len(data) % 4)


class Shard:
    """Random access to the rows of a file that `write_shard` wrote, in the file's pages.

    Args:
        path: the file.
        about: its entry in an index.json.
        ids: type of the token ids.

    Raises:
        UserError: its bytes are not those that were written.
    """

    def __init__(self, path: Path, about: dict[str, Any], ids: str):
        self.path, self.with_loss = path, "loss" in about["column_names"]
        size, digest = about["raw_data"]["bytes"], about["raw_data"]["hashes"][_HASH]
        damaged = UserError(
            f"{path}: its bytes are not those that were written; delete it, and fetch or prepare it"
            " again"
        )
        if path.stat().st_size != size:  # an empty one could not even be mapped
            raise damaged
        with path.open("rb") as file:
            self._bytes = np.frombuffer(
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8
            )
        if xxhash.xxh3_64_hexdigest(cast(Any, self._bytes)) != digest:
            raise damaged
        self._type = np.dtype(ids).newbyteorder("<")
        self._offsets = self._bytes[4 : 4 * (about["samples"] + 2)].view("<u4")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @cached_property
    def _words(self) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
        """Return the file as token ids, and where in it each row starts.

        Every row's bytes are a multiple of an id's, so one shift aligns them all.
        """
        starts = self._offsets[:-1].astype(np.int64) + (8 if self.with_loss else 4)
        width = self._type.itemsize
        shift = int(starts[0]) % width
        end = shift + (len(self._bytes) - shift) // width * width
        return self._bytes[shift:end].view(self._type), (starts - shift) // width

    def read(
        self, rows: NDArray[np.integer], starts: NDArray[np.integer], lengths: NDArray[np.integer]
    ) -> FlatTokens:
        """Return pieces of rows, end to end.

        Args:
            rows: [n] rows, each as often as it has pieces to read.
            starts: [n] first token of each piece in its row.
            lengths: [n] tokens of each piece.
        """
        words, row_starts = self._words
        lengths = np.asarray(lengths, dtype=np.int64)
        within = _ranges(lengths) + np.repeat(np.asarray(starts, np.int64), lengths)
        ids = words[np.repeat(row_starts[rows], lengths) + within]
        if not self.with_loss:
            return FlatTokens(ids, np.ones(len(ids), dtype=np.bool_))
        # The row's bits follow its ids; the number of these is in the sample's head.
        heads = self._offsets[:-1].astype(np.int64)[rows]
        sizes = self._sizes[rows]
        bits = np.repeat(heads + 8 + sizes, lengths) * 8 + within
        mask = (self._bytes[bits >> 3] >> (bits & 7).astype(np.uint8)) & 1
        return FlatTokens(ids, mask.view(np.bool_))

    @cached_property
    def _sizes(self) -> NDArray[np.int64]:
        """[n] bytes of the ids of each row."""
        heads = self._offsets[:-1].astype(np.int64)[:, None] + np.arange(4)
        return self._bytes[heads].view("<u4")[:, 0].astype(np.int64)


def _ranges(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return 0, 1, ... restarting for each length: [2, 3] -> 0 1 0 1 2."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) - np.repeat(ends - lengths, lengths)
