"""Several sources in one epoch: one used whole, of the others as much as their share asks for.

Of replay, for one: some plain text of what a model was pretrained on among the rows it is tuned on.

Example, a main source of 9,000 tokens and `share: 0.1`: the epoch has 9,000 / (1 - 0.1) = 10,000
tokens, so 1,000 of the other source are wanted. If that has 400, it is taken whole twice, and then
documents of it in a random order until the last 200 are reached.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foundry_ext.data.documents import Documents, count_outcomes
from foundry_ext.packing.collator import Document
from foundry_ext.utils.errors import UserError

# Which documents are drawn is part of the data, so no seed of a run changes it: runs of several
# seeds differ in order alone, and a run is resumed with the documents it was started with.
_DRAW_SEED = 17


@dataclass(frozen=True)
class Part:
    """One source of a mixture, and the documents of it that an epoch has."""

    documents: Documents
    chosen: NDArray[np.int64]
    """Indices into `documents`; one that is used twice is here twice."""

    def describe(self) -> dict[str, Any]:
        """documents in use, tokens and counts of an epoch."""
        documents, chosen = self.documents, self.chosen
        return {
            "documents": int(np.count_nonzero(documents.lengths[chosen])),
            "tokens": int(documents.lengths[chosen].sum()),
            "counts": count_outcomes(
                documents.outcomes[chosen], documents.num_truncated_tokens[chosen]
            ),
        }


def draw(sources: Sequence[Documents], shares: Sequence[float | None]) -> list[Part]:
    """The part of each source that an epoch has.

    Args:
        shares: of the epoch's tokens, each in (0, 1); None for the source that is used whole.

    Raises:
        UserError: see `check_shares`; nothing to draw from.
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
    """
    Raises:
        UserError: none or several without a share; a share outside (0, 1); a sum of 1 or more.
    """
    for position, share in enumerate(shares):
        if share is None:
            continue
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
            raise UserError(
                f"dataset.datasets[{position}].share: {share!r} is no share of an epoch's tokens;"
                " give a number between 0 and 1"
            )
    num_whole = list(shares).count(None)
    if num_whole != 1:
        raise UserError(
            f"dataset.datasets: {num_whole} of {len(shares)} sources have no share; leave it out"
            " of one, the main one, which is used whole, and give all others theirs"
        )
    total = sum(share or 0 for share in shares)
    if total >= 1:
        raise UserError(
            f"dataset.datasets: shares add up to {total:g}, which leaves nothing for the main"
            " source; their sum must be below 1"
        )


def _draw(lengths: NDArray[np.integer], wanted: float, position: int) -> NDArray[np.int64]:
    """Whole passes over all documents, then some in a random order until `wanted` tokens are
    reached, overshooting by less than the last document."""
    used = np.flatnonzero(lengths)
    if len(used) == 0:
        raise UserError(
            f"dataset.datasets[{position}]: no document is left to draw from; look at its counts"
            " above"
        )
    passes, rest = divmod(wanted, int(lengths[used].sum()))
    order = np.random.default_rng((_DRAW_SEED, position)).permutation(used)
    num_more = int(np.searchsorted(np.cumsum(lengths[order]), rest)) + 1 if rest else 0
    return np.concatenate([np.tile(used, int(passes)), order[:num_more]])


class MixedDocuments:
    """The documents of all parts, one part after another; read as `Documents` are.

    `counts` are of what an epoch has: a document that is used twice counts twice.
    """

    def __init__(self, parts: Sequence[Part]):
        self.parts = list(parts)
        numbers = np.arange(len(parts), dtype=np.int32)
        self.source = np.repeat(numbers, [len(part.chosen) for part in parts])
        """[n] which part a document is of."""
        self._row = np.concatenate([part.chosen for part in parts])
        self.lengths = self._gathered("lengths")
        self.outcomes = self._gathered("outcomes")
        self.num_truncated_tokens = self._gathered("num_truncated_tokens")
        self.counts = count_outcomes(self.outcomes, self.num_truncated_tokens)

    def _gathered(self, name: str) -> NDArray[np.integer]:
        return np.concatenate([getattr(part.documents, name)[part.chosen] for part in self.parts])

    def __len__(self) -> int:
        return len(self._row)

    def __getitem__(self, index: int) -> Document:
        return self.read(np.array([index]))[0]

    def locate(self, index: int) -> tuple[int, int]:
        """(source, number of the document in it)."""
        return int(self.source[index]), int(self._row[index])

    def read(self, indices: NDArray[np.integer]) -> list[Document]:
        """The documents of these indices, as views."""
        found: list[Any] = [None] * len(indices)
        sources, rows = self.source[indices], self._row[indices]
        for number in np.unique(sources):
            at = np.flatnonzero(sources == number)
            read = self.parts[number].documents.read(rows[at])
            for place, document in zip(at.tolist(), read, strict=True):
                found[place] = document
        return found

    @cached_property
    def fingerprint(self) -> str:
        """Of the sources' tokens and of which documents are drawn."""
        digest = hashlib.sha256()
        for part in self.parts:
            digest.update(part.documents.fingerprint.encode())
            digest.update(part.chosen.astype(np.int64).tobytes())
        return digest.hexdigest()[:16]
