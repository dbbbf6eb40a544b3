"""Several sources in one epoch: the main one completely, of the others as much as their share.

Replay is one use: some plain text of the pretraining data among the rows of fine-tuning.

Example, a main source of 9,000 tokens and `share: 0.1`: the epoch has 9,000 / (1 - 0.1) = 10,000
tokens, so 1,000 tokens of the other source are needed. If it has 400, it is used twice completely,
and documents drawn from it in random order supply the last 200.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foundry_ext.data.documents import Documents
from foundry_ext.data.indexed_documents import IndexedDocuments
from foundry_ext.data.row_outcome import count_outcomes
from foundry_ext.packing.collator import Document
from foundry_ext.utils.errors import UserError

# Which documents are drawn is part of the data, so no seed of a run changes it: runs of several
# seeds differ in order only, and a resumed run has the documents it started with.
_DRAW_SEED = 17


@dataclass(frozen=True)
class Part:
    """A source of a mixture, and its documents that an epoch uses."""

    documents: Documents
    chosen: NDArray[np.int64]
    """Indices into `documents`; a document used twice appears twice."""

    def describe(self) -> dict[str, Any]:
        """Return the documents in use, tokens and counts of an epoch."""
        documents, chosen = self.documents, self.chosen
        return {
            "documents": int(np.count_nonzero(documents.lengths[chosen])),
            "tokens": int(documents.lengths[chosen].sum()),
            "counts": count_outcomes(
                documents.outcomes[chosen],
                documents.num_truncated_tokens[chosen],
                documents.num_untrained[chosen],
            ),
        }


def draw(sources: Sequence[Documents], shares: Sequence[float | None]) -> list[Part]:
    """Return the part of each source that an epoch uses.

    `shares` are shares of the epoch's tokens, each in (0, 1); None for the main source.

    Raises:
        UserError: see `check_shares`; or a source has no documents to draw from.
    """
    check_shares(shares)
    main = sources[shares.index(None)]
    total = main.lengths.sum() / (1 - sum(share or 0 for share in shares))
    return [
        Part(source, np.arange(len(source)))
        if share is None
        else Part(source, _draw(source.lengths, share * total, position))
        for position, (source, share) in enumerate(zip(sources, shares, strict=True))
    ]


def check_shares(shares: Sequence[float | None]) -> None:
    """Check that one source has no share, and that the others' are in (0, 1) and add up to below 1.

    Raises:
        UserError: otherwise.
    """
    for position, share in enumerate(shares):
        if share is None:
            continue
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
            raise UserError(
                f"dataset.datasets[{position}].share: {share!r} must be a number between 0 and 1, a"
                " share of an epoch's tokens"
            )
    num_main = list(shares).count(None)
    if num_main != 1:
        raise UserError(
            f"dataset.datasets: {num_main} of {len(shares)} sources have no share; omit it for the"
            " main source, which is used completely, and set it for all others"
        )
    total = sum(share or 0 for share in shares)
    if total >= 1:
        raise UserError(
            f"dataset.datasets: shares add up to {total:g}, which leaves nothing for the main"
            " source; their sum must be below 1"
        )


def _draw(lengths: NDArray[np.integer], wanted: float, position: int) -> NDArray[np.int64]:
    """Return indices of documents with `wanted` tokens in all.

    Complete passes come first, then documents in random order, which overshoot by less than one.
    """
    used = np.flatnonzero(lengths)
    if len(used) == 0:
        raise UserError(
            f"dataset.datasets[{position}]: no document is left to draw from; see its counts above"
        )
    passes, rest = divmod(wanted, int(lengths[used].sum()))
    order = np.random.default_rng((_DRAW_SEED, position)).permutation(used)
    num_more = int(np.searchsorted(np.cumsum(lengths[order]), rest)) + 1 if rest else 0
    return np.concatenate([np.tile(used, int(passes)), order[:num_more]])


class MixedDocuments(IndexedDocuments):
    """The documents of all parts, one part after the other.

    `counts` are those of an epoch: a document that is used twice counts twice.
    """

    def __init__(self, parts: Sequence[Part]):
        self.parts = list(parts)
        indices = np.arange(len(parts), dtype=np.int32)
        self.source = np.repeat(indices, [len(part.chosen) for part in parts])
        """[n] index of the part that a document belongs to."""
        self._row = np.concatenate([part.chosen for part in parts])
        self.lengths = self._gathered("lengths")
        self.outcomes = self._gathered("outcomes")
        self.num_truncated_tokens = self._gathered("num_truncated_tokens")
        self.num_untrained = self._gathered("num_untrained")
        self.counts = count_outcomes(self.outcomes, self.num_truncated_tokens, self.num_untrained)

    def _gathered(self, name: str) -> NDArray[np.integer]:
        return np.concatenate([getattr(part.documents, name)[part.chosen] for part in self.parts])

    def locate(self, index: int) -> tuple[int, int]:
        """Return (source, index of the document in it)."""
        return int(self.source[index]), int(self._row[index])

    def read(self, documents: NDArray[np.integer]) -> list[Document]:
        found: list[Any] = [None] * len(documents)
        sources, rows = self.source[documents], self._row[documents]
        for source in np.unique(sources):
            positions = np.flatnonzero(sources == source)
            read = self.parts[source].documents.read(rows[positions])
            for position, document in zip(positions.tolist(), read, strict=True):
                found[position] = document
        return found

    def source_fingerprints(self) -> list[str]:
        """Return the hash of each source's tokens, drawn or not."""
        return [part.documents.fingerprint for part in self.parts]

    def sketches(self, documents: NDArray[np.integer], most_tokens: int) -> NDArray[np.uint64]:
        """Return [n], as in `Documents.sketches`."""
        sketches = np.zeros(len(documents), np.uint64)
        for source, part in enumerate(self.parts):
            mine = self.source[documents] == source
            rows = self._row[documents[mine]]
            sketches[mine] = part.documents.sketches(rows, most_tokens)
        return sketches

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the sources' tokens and of the documents drawn."""
        digest = hashlib.sha256()
        for part in self.parts:
            digest.update(part.documents.fingerprint.encode())
            digest.update(part.chosen.astype(np.int64).tobytes())
        return digest.hexdigest()[:16]
