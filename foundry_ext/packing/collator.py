"""The documents of a pack -> one flat pack, counted here and nowhere else."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from foundry_ext.packing.batch import IGNORE_INDEX, Pack


@dataclass(frozen=True)
class Document:
    """Token ids [L] and, for each, whether it is to be predicted [L] bool."""

    input_ids: NDArray[np.integer]
    loss_mask: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class PackCollator:
    """Lays documents end to end.

    Example: see data/batch.py. A document's first token never has a label: no token of the same
    document comes before it to predict it.
    """

    max_seq_len: int
    """Tokens no document exceeds; the pack's constant `max_seqlen`."""
    pack_tokens: int
    """Capacity of a pack, tokens."""
    pad_token_id: int = 0
    """Fills the one slot of an empty pack, and the tails of packs of a fixed shape."""
    fixed_shape: bool = False
    """Fill every pack to `pack_tokens` and its `cu_seqlens` to one length, for compilation."""
    max_documents: int | None = None
    """Most documents a pack of a fixed shape can get; None for one a token. A kernel starts work
    for every entry of `cu_seqlens`, empty ones too, so there should be few."""

    def __call__(self, documents: Sequence[Document]) -> Pack:
        """Joins documents; none at all gives the empty pack, one pad token without weight."""
        lengths = np.array([len(document.input_ids) for document in documents], dtype=np.int64)
        num_tokens = int(lengths.sum())
        num_computed_tokens = self._num_slots(num_tokens)
        input_ids = np.full(num_computed_tokens, self.pad_token_id, dtype=np.int64)
        labels = np.full(num_computed_tokens, IGNORE_INDEX, dtype=np.int64)
        cu_seqlens = self._offsets(lengths, num_computed_tokens)
        if documents:
            np.concatenate([one.input_ids for one in documents], out=input_ids[:num_tokens])
            loss_mask = np.concatenate([one.loss_mask for one in documents])
            loss_mask[cu_seqlens[: len(documents)]] = False
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
            num_documents=len(documents),
            num_tokens=num_tokens,
            num_loss_tokens=int(np.count_nonzero(labels != IGNORE_INDEX)),
            sum_squared_lengths=int(lengths @ lengths),
        )

    def _num_slots(self, num_tokens: int) -> int:
        # A kernel wants at least one token, hence the pad token of an empty pack.
        return self.pack_tokens if self.fixed_shape else max(num_tokens, 1)

    def _offsets(self, lengths: NDArray[np.int64], num_computed_tokens: int) -> NDArray[np.int64]:
        """0 and the ends, those of filling documents included.

        The filled tail is cut into documents of at most `max_seq_len`, as the kernel was promised.
        """
        ends = np.full(self._num_offsets(len(lengths)), num_computed_tokens, dtype=np.int64)
        ends[0] = 0
        np.cumsum(lengths, out=ends[1 : len(lengths) + 1])
        filled = np.arange(
            ends[len(lengths)] + self.max_seq_len, num_computed_tokens, self.max_seq_len
        )
        ends[len(lengths) + 1 : len(lengths) + 1 + len(filled)] = filled
        return ends  # repeated ends are empty documents

    def _num_offsets(self, num_documents: int) -> int:
        if not self.fixed_shape:
            return max(num_documents, 1) + 1
        if self.max_documents is None:
            return self.pack_tokens + 1
        most_fillers = -(-self.pack_tokens // self.max_seq_len)
        return min(self.max_documents + most_fillers, self.pack_tokens) + 1
