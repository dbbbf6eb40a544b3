"""Conversion between padded batches [B, S] and tokens laid end to end [T]."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from foundry_ext.utils.constants import IGNORE_INDEX


@dataclass(frozen=True)
class Padded:
    """Positions of the tokens of a padded batch.

    Example: masks `1 1 0` and `0 1 1` give slot_index 0 1 4 5, cu_seqlens 0 2 4 and
    position_ids 0 1 0 1.
    """

    batch: int
    seq_len: int
    """S, padding included."""
    slot_index: Tensor
    """[T] int64, each token's index in the flattened [B * S]."""
    cu_seqlens: Tensor
    """[B+1] int32."""
    position_ids: Tensor
    """[T] int64, from 0 in every row, padded left or right."""

    @classmethod
    def from_mask(
        cls, mask: Tensor | None, *, batch: int, seq_len: int, device: torch.device
    ) -> "Padded":
        """Find the tokens of a padded batch.

        Args:
            mask: [B, S], 1 for tokens, which are contiguous in a row, and 0 for padding. None
                means no padding.
            batch: B.
            seq_len: S.
            device: device of the result.

        Raises:
            ValueError: the mask has another shape, or a row has padding between tokens.
        """
        if mask is None:
            mask = torch.ones(batch, seq_len, dtype=torch.bool, device=device)
        if mask.shape != (batch, seq_len):
            raise ValueError(
                f"attention_mask is {list(mask.shape)}, but must be [{batch}, {seq_len}], ones and"
                " zeros; mark packed documents by cu_seqlens"
            )
        mask = mask.to(device, torch.bool)
        starts = mask & ~F.pad(mask, (1, 0))[:, :-1]
        if bool((starts.sum(1) > 1).any()):
            raise ValueError(
                "attention_mask has zeros between the ones of a row; pad only at a row's ends"
            )
        lengths = mask.sum(1)
        return cls(
            batch=batch,
            seq_len=seq_len,
            slot_index=mask.flatten().nonzero().squeeze(-1),
            cu_seqlens=F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32),
            position_ids=(mask.long().cumsum(1) - 1)[mask],
        )

    def unpad(self, x: Tensor) -> Tensor:
        """Remove padding: [B, S, ...] -> [T, ...]."""
        x = x.expand(self.batch, *x.shape[1:]).flatten(0, 1)
        return x[self.slot_index]

    def unpad_labels(self, labels: Tensor) -> Tensor:
        """Remove padding from labels: [B, S] -> [T].

        Every row's first label becomes -100, because the previous row must not predict it.
        """
        labels = self.unpad(labels)  # a copy, so the caller's labels do not change
        starts = self.cu_seqlens[:-1][self.cu_seqlens.diff() > 0].long()
        labels[starts] = IGNORE_INDEX
        return labels

    def repad(self, x: Tensor) -> Tensor:
        """Put padding back, as zeros: [T, ...] -> [B, S, ...]."""
        full = x.new_zeros(self.batch * self.seq_len, *x.shape[1:])
        full = full.index_copy(0, self.slot_index, x)
        return full.unflatten(0, (self.batch, self.seq_len))


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return ids and attention mask, both [B, S]: `generate` continues the last position.

    Example: prompts [[5, 6], [7]] with pad id 0 give ids [[5, 6], [0, 7]].
    """
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask
