"""The documents of a pack -> one flat pack, counted here and nowhere else."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from foundry_ext.data.batch import IGNORE_INDEX, Pack


@dataclass(frozen=True)
class Document:
    """Token ids [L] and, for each, whether it is to be predicted [L] bool."""

    input_ids: NDArray[np.integer]
    has_loss: NDArray[np.bool_]


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

    def __call__(self, documents: Sequence[Document]) -> Pack:
        """Joins documents; none at all gives the empty pack, one pad token without weight."""
        lengths = [len(document.input_ids) for document in documents]
        num_tokens = sum(lengths)
        input_ids = np.full(self._num_slots(num_tokens), self.pad_token_id, dtype=np.int64)
        labels = np.full(len(input_ids), IGNORE_INDEX, dtype=np.int64)
        start = 0
        for document, length in zip(documents, lengths, strict=True):
            end = start + length
            input_ids[start:end] = document.input_ids
            np.copyto(labels[start:end], document.input_ids, where=document.has_loss)
            labels[start] = IGNORE_INDEX
            start = end
        cu_seqlens = self._offsets(lengths, len(input_ids))
        spans = np.diff(cu_seqlens)
        position_ids = np.arange(len(input_ids)) - np.repeat(cu_seqlens[:-1], spans)
        return Pack(
            input_ids=torch.from_numpy(input_ids)[None],
            position_ids=torch.from_numpy(position_ids)[None],
            labels=torch.from_numpy(labels)[None],
            cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
            max_seqlen=self.max_seq_len,
            num_documents=len(documents),
            num_tokens=num_tokens,
            num_loss_tokens=int((labels != IGNORE_INDEX).sum()),
            sum_squared_lengths=sum(length**2 for length in lengths),
        )

    def _num_slots(self, num_tokens: int) -> int:
        # A kernel wants at least one token, hence the pad token of an empty pack.
        return self.pack_tokens if self.fixed_shape else max(num_tokens, 1)

    def _offsets(self, lengths: Sequence[int], num_slots: int) -> NDArray[np.int64]:
        """0 and the ends, those of filling documents included.

        The filled tail is cut into documents of at most `max_seq_len`, as the kernel was promised.
        """
        ends = [0, *np.cumsum(lengths, dtype=np.int64).tolist()]
        while ends[-1] < num_slots:
            ends.append(min(ends[-1] + self.max_seq_len, num_slots))
        if self.fixed_shape:
            # At most one document a token; repeated ends are empty documents.
            ends += [num_slots] * (num_slots + 1 - len(ends))
        return np.asarray(ends, dtype=np.int64)
