"""Collation of documents into one flat pack, the only place that counts its tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from foundry_ext.packing.batch import Pack
from foundry_ext.utils.constants import IGNORE_INDEX


@dataclass(frozen=True)
class Document:
    """Token ids [L], perhaps uint16, and a mask [L] bool of those that carry loss.

    Widen the ids before computing with them: in uint16, -100 is 65436.
    """

    input_ids: NDArray[np.integer]
    loss_mask: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class PackCollator:
    """A collator that lays documents end to end; packing/batch.py has an example.

    A document's first token never has a label, because no token of the same document comes before
    it to predict it.
    """

    max_seq_len: int
    """Most tokens of a document; the pack's constant `max_seqlen`."""
    pack_tokens: int
    """Capacity of a pack, in tokens."""
    pad_token_id: int = 0
    """Token of an empty pack, and of the padding of packs with a fixed shape."""
    fixed_shape: bool = False
    """Pad every pack to `pack_tokens` and its `cu_seqlens` to one length, for compilation."""
    max_documents: int | None = None
    """Most documents in a pack of a fixed shape; None for one per token. Kernels start work for
    every entry of `cu_seqlens`, even for empty documents, so keep it low."""

    def __call__(self, documents: Sequence[Document]) -> Pack:
        """Join documents; an empty sequence gives the empty pack, one pad token without loss."""
        if not documents:
            return self.join(np.empty(0, np.int64), np.empty(0, np.bool_), np.empty(0, np.int64))
        return self.join(
            np.concatenate([document.input_ids for document in documents]),
            np.concatenate([document.loss_mask for document in documents]),
            np.array([len(document.input_ids) for document in documents], dtype=np.int64),
        )

    def join(
        self, ids: NDArray[np.integer], loss_mask: NDArray[np.bool_], lengths: NDArray[np.int64]
    ) -> Pack:
        """Return the pack of documents that lie end to end already.

        Args:
            ids: [T] token ids of all documents.
            loss_mask: [T] those that carry loss; overwritten.
            lengths: [D] tokens of each document.
        """
        num_tokens, num_documents = len(ids), len(lengths)
        # A kernel needs at least one token, hence the pad token of an empty pack.
        num_computed_tokens = self.pack_tokens if self.fixed_shape else max(num_tokens, 1)
        input_ids = np.full(num_computed_tokens, self.pad_token_id, dtype=np.int64)
        labels = np.full(num_computed_tokens, IGNORE_INDEX, dtype=np.int64)
        cu_seqlens = self._offsets(lengths, num_computed_tokens)
        if num_documents:
            input_ids[:num_tokens] = ids
            loss_mask[cu_seqlens[:num_documents]] = False
            np.copyto(labels[:num_tokens], input_ids[:num_tokens], where=loss_mask)
        position_ids = np.arange(num_computed_tokens) - np.repeat(
            cu_seqlens[:-1], np.diff(cu_seqlens)
        )
        return Pack(
            input_ids=torch.from_numpy(input_ids)[None],
            position_ids=torch.from_numpy(position_ids)[None],
            labels=torch.from_numpy(labels)[None],
            cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
            max_seqlen=self.max_seq_len,
            num_documents=num_documents,
            num_tokens=num_tokens,
            num_loss_tokens=int(np.count_nonzero(labels != IGNORE_INDEX)),
            sum_squared_lengths=int(lengths @ lengths),
        )

    def _offsets(self, lengths: NDArray[np.int64], num_computed_tokens: int) -> NDArray[np.int64]:
        """Return 0 and the end of every document, including those that padding is cut into.

        Padding is cut into documents of at most `max_seq_len` tokens, because the kernel relies on
        `max_seqlen`.
        """
        num_documents = len(lengths)
        ends = np.full(self._num_offsets(num_documents), num_computed_tokens, dtype=np.int64)
        ends[0] = 0
        np.cumsum(lengths, out=ends[1 : num_documents + 1])
        start, step = ends[num_documents], self.max_seq_len
        padding = np.arange(start + step, num_computed_tokens, step)
        ends[num_documents + 1 : num_documents + 1 + len(padding)] = padding
        return ends  # repeated ends are empty documents

    def _num_offsets(self, num_documents: int) -> int:
        if not self.fixed_shape:
            return max(num_documents, 1) + 1
        if self.max_documents is None:
            return self.pack_tokens + 1
        most_padding = -(-self.pack_tokens // self.max_seq_len)
        return min(self.max_documents + most_padding, self.pack_tokens) + 1
