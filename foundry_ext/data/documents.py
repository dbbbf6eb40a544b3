"""Tokenised documents, memory-mapped; packs hold indices into them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import xxhash
from numpy.typing import NDArray

from foundry_ext.data.cache import DamagedTableError, discard
from foundry_ext.data.indexed_documents import IndexedDocuments
from foundry_ext.data.row_outcome import count_outcomes
from foundry_ext.data.token_columns import chunks_of
from foundry_ext.packing.collator import Document
from foundry_ext.utils.errors import UserError

# Columns of an earlier version's tables; data/token_columns.py has today's. num_cut is a document's
# num_truncated_tokens.
FEATURES = datasets.Features(
    {
        "input_ids": datasets.Sequence(datasets.Value("int32")),
        "has_loss": datasets.Sequence(datasets.Value("uint8")),
        "outcome": datasets.Value("int8"),
        "num_cut": datasets.Value("int32"),
    }
)
# Column, int32, in tables of rows with responses: those of a chat that are not trained.
NUM_UNTRAINED = "num_untrained"


_ODD = np.uint64(0x9E3779B185EBCA87)  # spreads a value over all bits, as in xxHash


def sketch(
    lengths: NDArray[np.integer], tokens: Sequence[NDArray[np.integer]]
) -> NDArray[np.uint64]:
    """Return [n], a hash of documents' lengths and of their tokens after each quarter but the last.

    Args:
        lengths: [n] tokens of each document.
        tokens: three times [n] token ids, at a quarter, half and three quarters of the length.
    """
    values = lengths.astype(np.uint64)
    for ids in tokens:
        values = (values ^ ids.astype(np.uint64)) * _ODD
    return values


# Tokens per checksum: .5 MB are read and hashed for the first document of a block.
_BLOCK = 2**18


@dataclass(frozen=True, kw_only=True)
class Stored:
    """The folder in the cache that a table was read from, and what was written there beside it."""

    folder: Path
    fingerprint: str
    """The property of `Documents`."""
    checksums: dict[str, Any]
    """The result of `Documents.checksums`."""


class Documents(IndexedDocuments):
    """Random access to token ids and loss masks, directly in the pages of the Arrow files.

    A table from the cache is compared with its checksums: lengths, loss masks and outcomes here,
    tokens block by block, when the first document of a block is read.

    Args:
        table: has the columns of `to_table`, or of `FEATURES`.
        stored: what the cache knows about the table, if it comes from there.

    Raises:
        DamagedTableError: lengths or outcomes are not those that were written.

    Attributes:
        lengths: [n] int32 tokens; 0 for a dropped document.
        outcomes: [n] int8, values of `RowOutcome`.
        num_truncated_tokens: [n] int32 tokens removed from a document, or dropped with it.
        num_untrained: [n] int32 responses of a chat that `target_responses` leaves out, counted
            with the first document of their row, also if that is dropped.
        counts: documents per outcome by its name in lower case, and `tokens_cut`; see
            `count_outcomes`.
    """

    def __init__(self, table: datasets.Dataset, *, stored: Stored | None = None):
        self._chunks = chunks_of(table)
        self._first = np.cumsum([0, *map(len, self._chunks)])
        self.lengths = np.empty(self._first[-1], np.int32)
        for start, chunk in zip(self._first, self._chunks, strict=False):
            lengths = self.lengths[start : start + len(chunk)]
            np.subtract(chunk.offsets[1:], chunk.offsets[:-1], out=lengths)
        self.outcomes = np.asarray(table.data.column("outcome").to_numpy(), dtype=np.int8)
        self.num_truncated_tokens = np.asarray(
            table.data.column("num_cut").to_numpy(), dtype=np.int32
        )
        self.num_untrained = (
            np.asarray(table.data.column(NUM_UNTRAINED).to_numpy(), dtype=np.int32)
            if NUM_UNTRAINED in table.column_names
            else np.zeros(len(self.lengths), dtype=np.int32)
        )
        self.counts = count_outcomes(self.outcomes, self.num_truncated_tokens, self.num_untrained)
        self._stored = stored
        # Per chunk, the blocks that are still to be compared with their checksums.
        self._unchecked: list[set[int]] = [set() for _ in self._chunks]
        if stored is not None:
            self.fingerprint = stored.fingerprint
            self._compare_index(stored.checksums)

    @property
    def key(self) -> str | None:
        """The table's key in the cache, if it comes from there."""
        return None if self._stored is None else self._stored.folder.name

    def locate(self, index: int) -> tuple[int, int]:
        """Return (source, index in it); there is one source here."""
        return 0, index

    def read(self, documents: NDArray[np.integer]) -> list[Document]:
        """Return the documents at these indices as views, looked up in one pass."""
        chunks = np.searchsorted(self._first, documents, side="right") - 1
        rows = documents - self._first[chunks]
        found = []
        for chunk, row in zip(chunks.tolist(), rows.tolist(), strict=True):
            tokens = self._chunks[chunk]
            if self._unchecked[chunk]:
                offsets = tokens.offsets
                self._compare_blocks(chunk, offsets.item(row), offsets.item(row + 1))
            found.append(tokens.document(row))
        return found

    def sketches(self, documents: NDArray[np.integer], most_tokens: int) -> NDArray[np.uint64]:
        """Return [n], a hash of each document's length and of three of its tokens.

        Documents are taken as if they were cut to `most_tokens`. Different documents may share a
        sketch, and an empty one has 0.
        """
        sketches = np.zeros(len(self), np.uint64)
        for start, chunk in zip(self._first, self._chunks, strict=False):
            offsets, ids = chunk.offsets, chunk.ids
            lengths = np.minimum(np.diff(offsets), most_tokens)
            hashes = sketches[start : start + len(lengths)]
            rows = np.flatnonzero(lengths)
            at = [offsets[rows] + lengths[rows] * quarter // 4 for quarter in (1, 2, 3)]
            hashes[rows] = sketch(lengths[rows], [ids[one] for one in at])
        return sketches[documents]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all tokens, loss masks and lengths; equal on every machine and path.

        The fingerprint of `datasets` changes with a file's path and time, and rows of a stream have
        no file, so a run could not be resumed with the very same data. Every number counts as in
        the first version's files, as int64, int32 or a byte, because a checkpoint of any version
        holds the fingerprint. It is computed when a table is written, and stored beside it.
        """
        digest = hashlib.sha256(self.lengths.astype(np.int64).tobytes())
        for chunk in self._chunks:
            start, end = int(chunk.offsets[0]), int(chunk.offsets[-1])
            for at in range(start, end, _BLOCK):
                digest.update(chunk.ids[at : min(at + _BLOCK, end)].astype(np.int32))
        for first, chunk in zip(self._first, self._chunks, strict=False):
            lengths = self.lengths[first : first + len(chunk)].tolist()
            for row, length in enumerate(lengths):
                digest.update(chunk.loss_mask(row, length).tobytes())
        return digest.hexdigest()[:16]

    def source_fingerprints(self) -> list[str]:
        """Return the fingerprint of each source; there is one here."""
        return [self.fingerprint]

    # --- checksums -------------------------------------------------------------------------------

    def checksums(self) -> dict[str, Any]:
        """Return checksums of the fingerprint and all columns.

        They are {"index": of lengths and outcomes, "tokens": [of each block, by chunk]}.
        """
        blocks = [
            [self._hash_block(chunk, block) for block in range(self._num_blocks(chunk))]
            for chunk in range(len(self._chunks))
        ]
        return {"index": self._hash_index(), "tokens": blocks}

    def _hash_index(self) -> str:
        digest = xxhash.xxh3_64(self.fingerprint.encode())
        for chunk in self._chunks:
            for array in chunk.index():
                digest.update(array)
        digest.update(self.outcomes.tobytes())
        digest.update(self.num_truncated_tokens.tobytes())
        digest.update(self.num_untrained.tobytes())
        return digest.hexdigest()

    def _num_blocks(self, chunk: int) -> int:
        return -(-len(self._chunks[chunk].ids) // _BLOCK)

    def _hash_block(self, chunk: int, block: int) -> str:
        return self._chunks[chunk].hash_block(slice(block * _BLOCK, (block + 1) * _BLOCK))

    def _compare_index(self, checksums: dict[str, Any]) -> None:
        sizes = [len(blocks) for blocks in checksums["tokens"]]
        same = sizes == [self._num_blocks(chunk) for chunk in range(len(self._chunks))]
        if not same or self._hash_index() != checksums["index"]:
            raise DamagedTableError("the documents' lengths are not those that were written")
        self._unchecked = [set(range(size)) for size in sizes]

    def _compare_blocks(self, chunk: int, start: int, end: int) -> None:
        """Compare the blocks of tokens start to end of a chunk, unless that was done before."""
        assert self._stored is not None
        for block in self._unchecked[chunk] & {*range(start // _BLOCK, -(-end // _BLOCK))}:
            if self._hash_block(chunk, block) != self._stored.checksums["tokens"][chunk][block]:
                raise UserError(self._refuse(chunk))
            self._unchecked[chunk].remove(block)

    def _refuse(self, chunk: int) -> str:
        """Discard the table; return the error's line."""
        assert self._stored is not None
        folder, rows = self._stored.folder, self._first[chunk : chunk + 2]
        fault = f"tokens of documents {rows[0]} to {rows[1] - 1} are not those that were written"
        way_out = "start the same command again"
        if not discard(folder, fault):
            way_out = f"delete the folder and {way_out}"
        return (
            f"token cache {folder}: {fault}, so a disk or memory may be failing; {way_out}, which"
            " tokenizes the rows anew"
        )
