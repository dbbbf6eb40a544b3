"""Documents whose lengths and outcomes are arrays in memory, over all of them."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from foundry_ext.data.row_outcome import RowOutcome
from foundry_ext.packing.batch import Pack
from foundry_ext.packing.collator import Document, PackCollator


class IndexedDocuments(ABC):
    """Documents named by their indices, 0 to n - 1; subclasses read them.

    `PreparedDocuments` answers the same questions without such arrays.

    Attributes:
        lengths: [n] int32 tokens; 0 for a dropped document.
        outcomes: [n] int8, values of `RowOutcome`.
        num_truncated_tokens: [n] int32 tokens removed from a document, or dropped with it.
    """

    lengths: NDArray[np.integer]
    outcomes: NDArray[np.integer]
    num_truncated_tokens: NDArray[np.integer]
    fingerprint: str

    @abstractmethod
    def read(self, documents: NDArray[np.integer]) -> list[Document]:
        """Return documents, as views."""

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Document:
        return self.read(np.array([index]))[0]

    @property
    def num_used(self) -> int:
        """Documents of an epoch that are used."""
        return int(np.count_nonzero(self.lengths))

    @property
    def num_tokens(self) -> int:
        """Tokens of an epoch."""
        return int(self.lengths.sum())

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return int(self.lengths.max())

    @property
    def plan_fingerprint(self) -> str:
        """Hash of all that decides the packs but the sampler's settings."""
        return self.fingerprint

    def count_loss_tokens(self) -> int:
        """Return the tokens of an epoch that are predicted.

        A document's first token has nothing before it to be predicted from.
        """
        (used,) = self.used_documents()
        return sum(int(self[int(index)].loss_mask[1:].sum()) for index in used)

    def used_documents(self) -> Iterator[NDArray[np.int64]]:
        """Yield the documents that are used, in their order, block by block: here in one."""
        yield np.flatnonzero(self.lengths)

    def lengths_of(self, documents: NDArray[np.integer]) -> NDArray[np.int64]:
        """Return [n] tokens of documents."""
        return self.lengths[documents].astype(np.int64)

    def outcome_of(self, document: int) -> tuple[RowOutcome, int]:
        """Return the outcome of a document, and how many tokens were removed from it."""
        outcome = RowOutcome(int(self.outcomes[document]))
        return outcome, int(self.num_truncated_tokens[document])

    def pack(self, documents: NDArray[np.integer], collator: PackCollator) -> Pack:
        """Return a pack of documents."""
        return collator(self.read(documents))
