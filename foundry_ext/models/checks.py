"""What a kernel would read past its memory for, or silently leave out, refused before it runs.

On a CPU by an error that names the value. On a GPU the device checks when it gets there, so that
the host never waits for it: the process then ends with "device-side assert triggered", and the text
is on stderr.

T tokens, D documents.
"""

import torch
from torch import Tensor

from foundry_ext.utils.constants import IGNORE_INDEX


class IdsOutside(ValueError):
    """`place`: the first one's, in the flattened tensor."""

    def __init__(self, message: str, place: int):
        super().__init__(message)
        self.place = place


def check_ids(input_ids: Tensor | None, labels: Tensor | None, vocabulary: int) -> None:
    """Ids and labels, of any shape, must be in the vocabulary; labels may be -100, too.

    Raises:
        IdsOutside: on a CPU.
    """
    for name, ids in (("input_ids", input_ids), ("labels", labels)):
        if ids is None or ids.numel() == 0:
            continue
        inside = (ids >= 0) & (ids < vocabulary)
        if name == "labels":
            inside |= ids == IGNORE_INDEX
        if ids.is_cuda:
            text = f"{name} are not all from 0 to {vocabulary - 1}, the model's vocabulary"
            torch._assert_async(inside.all(), text)  # pyright: ignore[reportPrivateImportUsage]
        elif not inside.all():
            place = int((~inside).flatten().nonzero()[0])
            raise IdsOutside(
                f"{name}: {int(ids.flatten()[place])} at position {place} is outside the model's"
                f" vocabulary of {vocabulary}{_OR_IGNORED[name]}; the tokenizer, or what made the"
                " batch, belongs to another model",
                place,
            )


_OR_IGNORED = {"input_ids": "", "labels": f" and is not {IGNORE_INDEX}"}


def check_packed(hidden: Tensor, position_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> None:
    """Documents must cover exactly the tokens: a batch cut across would go on training silently.

    Args:
        hidden: [1, T, ...]; position_ids: [1, T]; cu_seqlens: [D+1].

    Raises:
        ValueError: shapes anywhere, values on a CPU.
    """
    num_tokens = hidden.shape[1]
    if hidden.shape[0] != 1:
        raise ValueError(f"a packed batch is [1, T], not {list(hidden.shape[:2])}; join its packs")
    if position_ids.shape != (1, num_tokens):
        raise ValueError(
            f"position_ids is {list(position_ids.shape)}, needs [1, {num_tokens}] as input_ids"
        )
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(
            f"cu_seqlens is {list(cu_seqlens.shape)}, needs [documents + 1]: 0 and every document's"
            " end"
        )
    length = cu_seqlens.diff()
    whole = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == num_tokens) & (length >= 0).all()
    fits = (length <= max_seqlen).all()
    if cu_seqlens.is_cuda:
        torch._assert_async(  # pyright: ignore[reportPrivateImportUsage]
            whole & fits, "cu_seqlens does not go from 0 to T in documents of at most max_seqlen"
        )
    elif not whole:
        raise ValueError(
            f"cu_seqlens {cu_seqlens.tolist()} does not go from 0 to the number of tokens,"
            f" {num_tokens}: the batch was cut across; split it with data.batch.split_batch"
        )
    elif not fits:
        raise ValueError(
            f"max_seqlen: {max_seqlen} is exceeded by a document of {int(length.max())} tokens,"
            " whose end a kernel would leave out"
        )
