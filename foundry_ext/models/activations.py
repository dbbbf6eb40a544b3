"""Count of the tensors that a decoder layer saves for the backward pass, by running it.

Forward passes of one layer and of two, on a few tokens at full width, differ by one layer's saved
tensors, which grow linearly in the tokens.
"""

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from foundry_ext.models.decoder import SmolLM2DecoderLayer, decoder_layer
from foundry_ext.utils.constants import IGNORE_INDEX

_COUNT_TOKENS = 64
# torch's own name for: decide what is saved as for generated code, then run the operators.
_PARTITION = "aot_eager_decomp_partition"


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Bytes that one decoder layer saves for the backward pass."""

    per_token: float
    fixed: float
    """Bytes independent of the number of tokens: weights cast to bf16."""


def count_layer(
    build: Callable[[int], nn.Module], *, precision: str, compiled: bool = False
) -> Layer:
    """Count what a layer saves, by forward passes of models with one layer and with two.

    What compiled layers save is decided before code is generated, so no code is. It takes some ten
    seconds nevertheless.

    Args:
        build: a function from the number of layers to a model on the CPU, with or without an
            adapter. The values of its weights and its vocabulary's size do not matter.
        precision: a key of `PRECISIONS`.
        compiled: whether the layers are compiled, which save fewer tensors.
    """
    if compiled:  # beyond eight shapes torch would run the rest uncompiled, without a word
        torch.compiler.reset()
    layer = torch.compile(decoder_layer, backend=_PARTITION) if compiled else None
    counts = []
    for num_layers in (1, 2):
        model = build(num_layers).train()
        for module in model.modules():
            if isinstance(module, SmolLM2DecoderLayer):
                module.compiled = layer  # pyright: ignore[reportAttributeAccessIssue]
        if precision == "bf16":
            model = model.bfloat16()
        lengths = (_COUNT_TOKENS, 2 * _COUNT_TOKENS)
        counts.append([saved_bytes(model, num_tokens, precision) for num_tokens in lengths])
    few, many = (two_layers - one_layer for one_layer, two_layers in zip(*counts, strict=True))
    per_token = (many - few) / _COUNT_TOKENS
    return Layer(per_token=per_token, fixed=few - per_token * _COUNT_TOKENS)


class _Saved:
    """A tensor saved by autograd; it is freed together with the graph."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


def saved_bytes(model: nn.Module, num_tokens: int, precision: str) -> int:
    """Return the bytes that autograd holds after a forward pass over one document.

    Parameters are not counted.
    """
    saved: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> _Saved:
        entry = _Saved(tensor)
        saved.add(entry)
        return entry

    batch = one_document(num_tokens)
    with autocast(precision), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x.tensor):
        loss = model(**batch).loss
    assert loss.requires_grad  # and is alive, and so is the graph
    # By storage, because views share one.
    storages = [entry.tensor.untyped_storage() for entry in saved]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    for parameter in model.parameters():
        sizes.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


def one_document(num_tokens: int) -> dict[str, Any]:
    """Return a packed batch of one document on the CPU, with a label at every token but its first.

    All tokens are 0, so a vocabulary of any size has them.
    """
    ids = torch.zeros(1, num_tokens, dtype=torch.long)
    positions = torch.arange(num_tokens)[None]
    return {
        "input_ids": ids,
        "position_ids": positions,
        "labels": ids.masked_fill(positions == 0, IGNORE_INDEX),
        "cu_seqlens": torch.tensor([0, num_tokens], dtype=torch.int32),
        "max_seqlen": num_tokens,
        "num_loss_tokens": num_tokens - 1,
    }


def autocast(precision: str, device: str = "cpu") -> AbstractContextManager[Any]:
    """Return the trainer's autocast for a precision, with bf16 for amp_fp16, which is as wide."""
    if not precision.startswith("amp_"):
        return nullcontext()
    return torch.autocast(device, torch.bfloat16)
