"""Tokenised documents, memory-mapped; packs hold indices into them."""

import hashlib
from enum import IntEnum
from functools import cached_property

import datasets
import numpy as np
from numpy.typing import NDArray

from foundry_ext.packing.collator import Document


class RowOutcome(IntEnum):
    """Outcome of tokenising a row; a dropped row stays as an empty document, to be counted."""

    KEPT = 0
    TRUNCATED = 1
    SPLIT = 2
    DROPPED_OVERLONG = 3
    DROPPED_NO_LOSS = 4
    DROPPED_EMPTY = 5


# Caches on disk hold these column names: has_loss is a document's loss_mask, num_cut its
# num_truncated_tokens.
FEATURES = datasets.Features(
    {
        "input_ids": datasets.Sequence(datasets.Value("int32")),
        "has_loss": datasets.Sequence(datasets.Value("uint8")),
        "outcome": datasets.Value("int8"),
        "num_cut": datasets.Value("int32"),
    }
)


_ODD = np.uint64(0x9E3779B185EBCA87)  # spreads a value over all bits, as in xxHash


def count_outcomes(
    outcomes: NDArray[np.integer], num_truncated_tokens: NDArray[np.integer]
) -> dict[str, int]:
    """Return {"kept": 3, "truncated": 1, ..., "tokens_cut": 9}."""
    counts = np.bincount(outcomes, minlength=len(RowOutcome)).tolist()
    named = {kind.name.lower(): counts[kind] for kind in RowOutcome}
    return {**named, "tokens_cut": int(num_truncated_tokens.sum())}


class Documents:
    """Random access to token ids and loss masks, directly in the pages of the Arrow files.

    Args:
        table: has the columns of `FEATURES`.
        fingerprint: the value of that property, if it is known already.

    Attributes:
        lengths: [n] int32 tokens; 0 for a dropped document.
        outcomes: [n] int8, values of `RowOutcome`.
        num_truncated_tokens: [n] int32 tokens removed from a document, or dropped with it.
        counts: documents per outcome by its name in lower case, and `tokens_cut`.
    """

    def __init__(self, table: datasets.Dataset, *, fingerprint: str | None = None):
        ids, flags = (table.data.column(name).chunks for name in ("input_ids", "has_loss"))
        self._chunks = [
            (
                chunk.offsets.to_numpy(),
                chunk.values.to_numpy(),
                flag.offsets.to_numpy(),
                flag.values.to_numpy().view(np.bool_),
            )
            for chunk, flag in zip(ids, flags, strict=True)
        ]
        sizes = [len(chunk[0]) - 1 for chunk in self._chunks]
        self._first = np.cumsum([0, *sizes])
        self.lengths = np.empty(self._first[-1], np.int32)
        for start, (offsets, *_) in zip(self._first, self._chunks, strict=False):
            np.subtract(
                offsets[1:], offsets[:-1], out=self.lengths[start : start + len(offsets) - 1]
            )
        self.outcomes = np.asarray(table.data.column("outcome").to_numpy(), dtype=np.int8)
        self.num_truncated_tokens = np.asarray(
            table.data.column("num_cut").to_numpy(), dtype=np.int32
        )
        self.counts = count_outcomes(self.outcomes, self.num_truncated_tokens)
        if fingerprint is not None:
            self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Document:
        return self.read(np.array([index]))[0]

    def locate(self, index: int) -> tuple[int, int]:
        """Return (source, index in it); there is one source here."""
        return 0, index

    def read(self, indices: NDArray[np.integer]) -> list[Document]:
        """Return the documents at these indices as views, looked up in one pass."""
        chunks = np.searchsorted(self._first, indices, side="right") - 1
        rows = indices - self._first[chunks]
        documents = []
        for chunk, row in zip(chunks.tolist(), rows.tolist(), strict=True):
            ids_at, ids, flags_at, flags = self._chunks[chunk]
            documents.append(
                Document(
                    input_ids=ids[ids_at[row] : ids_at[row + 1]],
                    loss_mask=flags[flags_at[row] : flags_at[row + 1]],
                )
            )
        return documents

    def sketches(self, most_tokens: int) -> NDArray[np.uint64]:
        """Return [n], a hash of each document's length and of three of its tokens.

        Documents are taken as if they were cut to `most_tokens`. Different documents may share a
        sketch, and an empty one has 0.
        """
        sketches = np.zeros(len(self), np.uint64)
        for start, (offsets, ids, *_) in zip(self._first, self._chunks, strict=False):
            lengths = np.minimum(np.diff(offsets), most_tokens)
            hashes = sketches[start : start + len(lengths)]
            rows = np.flatnonzero(lengths)
            values = lengths[rows].astype(np.uint64)
            for quarter in (1, 2, 3):
                at = offsets[rows] + lengths[rows] * quarter // 4
                values = (values ^ ids[at].astype(np.uint64)) * _ODD
            hashes[rows] = values
        return sketches

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all tokens, loss masks and lengths; equal on every machine and path.

        The fingerprint of `datasets` changes with a file's path and time, and rows of a stream have
        no file, so a run could not be resumed with the very same data. Measured: 1.4 GB/s at 5
        bytes per token, so it is computed when a table is written, and stored beside it.
        """
        digest = hashlib.sha256(self.lengths.astype(np.int64).tobytes())
        for ids_at, ids, *_ in self._chunks:
            digest.update(ids[ids_at[0] : ids_at[-1]])
        for *_, flags_at, flags in self._chunks:
            digest.update(flags[flags_at[0] : flags_at[-1]])
        return digest.hexdigest()[:16]
