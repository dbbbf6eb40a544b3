"""The pack: its keys, its counts, and the joining of packs into a microbatch.

T tokens, D documents. A *document* is one training example. A *pack* is complete documents laid
end to end. A *loader batch* is a list of packs. A *microbatch* is some of them joined. Batch sizes
count packs, Composer's samples are documents, and its tokens are real tokens.

| key | shape, type | meaning |
|---|---|---|
| `input_ids` | [1, T] int64 | the documents end to end |
| `position_ids` | [1, T] int64 | 0, 1, ... restarting at each document |
| `labels` | [1, T] int64 | unshifted; -100 without loss and at every document's first token |
| `cu_seqlens` | [D+1] int32 | 0 and each document's end; last = T |
| `max_seqlen` | int | `max_seq_len`, constant over the run |
| `num_documents`, `num_tokens`, `num_loss_tokens` | int | counted on the CPU, padding excluded |
| `sum_squared_lengths` | int | over documents, for the FLOPs of attention; padding excluded |

Example, documents `5 6 7` and `8 9` with prompts of one token: input_ids 5 6 7 8 9,
position_ids 0 1 2 0 1, labels -100 6 7 -100 9, cu_seqlens 0 3 5, counts 2, 5, 3, and 9 + 4 = 13.
"""

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

from foundry_ext.utils.errors import UserError


class Pack(TypedDict):
    """Documents laid end to end, with their counts; the keys are described above."""

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    num_documents: int
    num_tokens: int
    num_loss_tokens: int
    sum_squared_lengths: int


Batch = Sequence[Pack] | Pack


def join_packs(packs: Sequence[Pack]) -> Pack:
    """Lay packs end to end and rebase their offsets.

    Example: cu_seqlens 0 3 5 and 0 2 become 0 3 5 7.
    """
    if len(packs) == 1:
        return packs[0]
    offsets, end = [packs[0]["cu_seqlens"][:1]], 0
    for pack in packs:
        offsets.append(pack["cu_seqlens"][1:] + end)
        end += pack["input_ids"].shape[1]
    return Pack(
        input_ids=torch.cat([pack["input_ids"] for pack in packs], dim=1),
        position_ids=torch.cat([pack["position_ids"] for pack in packs], dim=1),
        labels=torch.cat([pack["labels"] for pack in packs], dim=1),
        cu_seqlens=torch.cat(offsets),
        max_seqlen=max(pack["max_seqlen"] for pack in packs),
        num_documents=sum(pack["num_documents"] for pack in packs),
        num_tokens=sum(pack["num_tokens"] for pack in packs),
        num_loss_tokens=sum(pack["num_loss_tokens"] for pack in packs),
        sum_squared_lengths=sum(pack["sum_squared_lengths"] for pack in packs),
    )


def split_batch(batch: Batch, microbatch_size: int | float | None) -> list[Pack]:
    """Split a loader batch into microbatches between packs, never inside one.

    It replaces Composer's default, which cuts every tensor along its first dimension.

    Args:
        batch: the loader's list of packs; a single pack counts as a list of one.
        microbatch_size: packs per microbatch (`device_train_microbatch_size`).

    Raises:
        UserError: the size is not a positive integer. None is how Composer passes "auto".
    """
    if microbatch_size is None:
        raise UserError(
            "device_train_microbatch_size: auto does not work with packs: it would halve the number"
            " of packs, not of tokens. Set it (for your own Evaluator, its"
            " device_eval_microbatch_size) to 1, and size pack_tokens to fill the device"
        )
    if isinstance(microbatch_size, bool) or microbatch_size != int(microbatch_size):
        raise UserError(
            f"microbatch size {microbatch_size!r} must be an integer number of packs; use 1, and"
            " size pack_tokens to fill the device"
        )
    packs, size = _packs(batch), int(microbatch_size)
    if size < 1:
        raise UserError(f"microbatch size {size} must be at least one pack; use 1")
    return [join_packs(packs[start : start + size]) for start in range(0, len(packs), size)]


def num_documents(batch: Batch) -> int:
    """Return the number of documents, which Composer counts as samples."""
    return sum(pack["num_documents"] for pack in _packs(batch))


def num_tokens(batch: Batch) -> dict[str, int]:
    """Return Composer's token counts.

    `total` drives its clock; `loss_generating` weighs the losses of microbatches and ranks.
    """
    packs = _packs(batch)
    return {
        "total": sum(pack["num_tokens"] for pack in packs),
        "loss_generating": sum(pack["num_loss_tokens"] for pack in packs),
    }


def _packs(batch: Batch) -> Sequence[Pack]:
    return [batch] if isinstance(batch, dict) else batch  # pyright: ignore[reportReturnType]
