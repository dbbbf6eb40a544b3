"""Checks of batches that would make a kernel read out of bounds, or silently skip tokens.

On a CPU an error names the value. On a GPU the device checks asynchronously, so the host never
waits for it: the process then ends with "device-side assert triggered", and the message is on
stderr.

T tokens, D documents.
"""

import torch
from torch import Tensor

from foundry_ext.utils.constants import IGNORE_INDEX
from foundry_ext.utils.errors import UserError


class IdsOutside(ValueError):
    """Ids outside the vocabulary; `index` is the first one's in the flattened tensor."""

    def __init__(self, message: str, index: int):
        super().__init__(message)
        self.index = index


def check_ids(input_ids: Tensor | None, labels: Tensor | None, vocabulary: int) -> None:
    """Check that ids and labels, of any shape, are in the vocabulary; labels may also be -100.

    Args:
        input_ids: token ids, or None.
        labels: labels, or None.
        vocabulary: number of token ids.

    Raises:
        IdsOutside: one is outside, on a CPU.
    """
    for name, ids in (("input_ids", input_ids), ("labels", labels)):
        if ids is None or ids.numel() == 0:
            continue
        inside = (ids >= 0) & (ids < vocabulary)
        if name == "labels":
            inside |= ids == IGNORE_INDEX
        if ids.is_cuda:
            text = f"{name} must be from 0 to {vocabulary - 1}, the model's vocabulary"
            torch._assert_async(inside.all(), text)  # pyright: ignore[reportPrivateImportUsage]
        elif not inside.all():
            index = int((~inside).flatten().nonzero()[0])
            ignored = f" and is not {IGNORE_INDEX}" if name == "labels" else ""
            raise IdsOutside(
                f"{name}: {int(ids.flatten()[index])} at position {index} is outside the model's"
                f" vocabulary of {vocabulary}{ignored}; the batch was made with the tokenizer of"
                " another model",
                index,
            )


def check_positions(max_seqlen: int, positions: int) -> None:
    """Check that documents cannot be longer than the model has positions; costs no synchronisation.

    train.py checks the loaders before the first step, llm-foundry's own command does not.

    Raises:
        UserError: they can; names both numbers and the way out.
    """
    if max_seqlen > positions:
        raise UserError(
            f"max_seq_len: {max_seqlen} is more than the model's {positions} positions; lower it in"
            " the loader's dataset, or raise model.config_overrides.max_position_embeddings"
        )


def check_packed(hidden: Tensor, position_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> None:
    """Check that the documents of a packed batch cover exactly its tokens.

    A batch cut inside a pack, as by Composer's default `split_batch`, would otherwise train on
    without an error.

    Args:
        hidden: [1, T, ...].
        position_ids: [1, T].
        cu_seqlens: [D+1].
        max_seqlen: most tokens of a document.

    Raises:
        ValueError: a shape is wrong, or on a CPU a value.
    """
    num_tokens = hidden.shape[1]
    if hidden.shape[0] != 1:
        raise ValueError(
            f"a packed batch must be [1, T], not {list(hidden.shape[:2])}; join its packs"
        )
    if position_ids.shape != (1, num_tokens):
        raise ValueError(
            f"position_ids is {list(position_ids.shape)}, but must be [1, {num_tokens}] like"
            " input_ids"
        )
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(
            f"cu_seqlens is {list(cu_seqlens.shape)}, but must be [documents + 1]: 0 and every"
            " document's end"
        )
    length = cu_seqlens.diff()
    complete = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == num_tokens) & (length >= 0).all()
    fits = (length <= max_seqlen).all()
    if cu_seqlens.is_cuda:
        torch._assert_async(  # pyright: ignore[reportPrivateImportUsage]
            complete & fits, "cu_seqlens must go from 0 to T in documents of at most max_seqlen"
        )
    elif not complete:
        raise ValueError(
            f"cu_seqlens {cu_seqlens.tolist()} must go from 0 to the number of tokens,"
            f" {num_tokens}: the batch was cut inside a pack; use packing.batch.split_batch"
        )
    elif not fits:
        raise ValueError(
            f"max_seqlen: {max_seqlen} is exceeded by a document of {int(length.max())} tokens,"
            " whose end a kernel would skip; pass at least that length"
        )
