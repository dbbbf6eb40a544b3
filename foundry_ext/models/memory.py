"""Memory that a training step takes, from its parts, before anything is trained.

Weights, gradients and optimizer state are counted from the configuration. What a layer keeps for
the backward pass is counted on the model's own code: one layer and two are run forward on a few
tokens, at full width, and the difference, a straight line in tokens, is a layer's. The loss is a
formula of models/loss.py. Checked against the allocator on a CPU, tests/models/test_memory.py; not
measured on a GPU, whose flash kernels keep the same tensors (queries, keys, values, output), but
whose compiled layers keep fewer.

T tokens of a microbatch, D hidden size, V vocabulary.
"""

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers.models.llama import LlamaConfig

from foundry_ext.models.loss import CHUNK_ELEMENTS
from foundry_ext.utils.errors import UserError

GIB = 2**30
# Largest memory of a card that torch sees, GiB.
CARDS = {
    "RTX 3090 24 GB": 23.6,
    "RTX 4090 24 GB": 23.6,
    "A100 40 GB": 39.4,
    "A100 80 GB": 79.2,
    "H100 80 GB": 79.2,
    "H200 141 GB": 139.8,
}
# Of a card's memory, what is left for tensors: CUDA's context and the kernels' workspaces take some
# 1 GiB, and an allocator's blocks are never all full. An assumption, not a measurement.
CONTEXT_BYTES = GIB
USABLE_SHARE = 0.92

# Bytes of a weight, of a number that autocast or the weights compute in, and of the residual stream
# between layers, which autocast keeps as wide as the weights.
PRECISIONS = {"fp32": (4, 4, 4), "amp_bf16": (4, 2, 4), "amp_fp16": (4, 2, 4), "bf16": (2, 2, 2)}
# States as large as the trained parameters, by a part of the optimizer's name.
OPTIMIZER_STATES = {"lion": 1, "adam": 2, "sgd": 0}
_COUNT_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What one decoder layer keeps for the backward pass, bytes."""

    per_token: float
    fixed: float
    """Whatever the number of tokens: weights cast to bf16."""


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Of a model, an adapter's included: what is frozen is the base under an adapter."""

    trainable: int
    frozen: int
    trainable_bytes: int
    frozen_bytes: int

    @classmethod
    def of(cls, model: nn.Module) -> "Parameters":
        """Tied weights once; a model on the meta device will do."""
        numbers, sizes = {True: 0, False: 0}, {True: 0, False: 0}
        for parameter in model.parameters():
            numbers[parameter.requires_grad] += parameter.numel()
            sizes[parameter.requires_grad] += parameter.nbytes
        return cls(
            trainable=numbers[True],
            frozen=numbers[False],
            trainable_bytes=sizes[True],
            frozen_bytes=sizes[False],
        )

    @property
    def total(self) -> int:
        return self.trainable + self.frozen

    @property
    def is_full(self) -> bool:
        return self.frozen == 0


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes by part, all there at once when a step needs the most."""

    weights: int
    """An adapter's excluded."""
    adapter: int
    frozen_copy: int
    """Of the base model, to measure KL against in full fine-tuning."""
    optimizer: int
    gradients: int
    """Of earlier microbatches, where several make up a batch; DDP's buckets are as much again."""
    activations: int
    """Kept for the backward pass by all layers; with checkpointing each layer's input alone."""
    weight_casts: int
    """Copies of weights in the dtype that autocast computes in."""
    backward: int
    """Gradients inside a layer and, with checkpointing, its activations computed again; they are
    not there together with the loss."""
    head: int
    """Gradient of the head's weight."""
    chunk: int
    """States at labelled positions and, a chunk of them at a time, logits and what follows."""

    @property
    def peak(self) -> int:
        parts = asdict(self)
        backward, chunk = parts.pop("backward"), parts.pop("chunk")
        return sum(parts.values()) + max(backward, chunk)


def optimizer_states(name: str) -> int:
    """How many tensors of the trained parameters' size an optimizer keeps, by its name.

    Raises:
        UserError: not known.
    """
    found = next((count for part, count in OPTIMIZER_STATES.items() if part in name.lower()), None)
    if found is None:
        raise UserError(
            f"optimizer.name: {name!r} has an unknown state; memory can be estimated for names with"
            f" {', '.join(OPTIMIZER_STATES)}"
        )
    return found


def estimate_memory(
    config: LlamaConfig,
    layer: Layer,
    parameters: Parameters,
    *,
    num_tokens: int,
    num_loss_tokens: int | None = None,
    precision: str,
    optimizer: str,
    activation_checkpointing: bool = False,
    frozen_copy: bool = False,
    accumulates: bool = True,
    num_ranks: int = 1,
) -> Memory:
    """The most that a training step holds at once on one device.

    Args:
        layer: `count_layer` of this model and precision.
        num_tokens: T, those that fill a fixed shape included.
        num_loss_tokens: of which labelled; all where not given.
        precision: a key of `PRECISIONS`, as the trainer names it, or bf16 for weights in bf16.
        accumulates: whether a device's batch has several microbatches.
        num_ranks: above 1 with DDP; sharding by FSDP is not estimated.
    """
    stored, compute, residual = PRECISIONS[precision]
    hidden, vocabulary, layers = config.hidden_size, config.vocab_size, config.num_hidden_layers
    labelled = num_tokens if num_loss_tokens is None else num_loss_tokens
    full, trained = parameters.is_full, parameters.trainable_bytes
    kept = layer.per_token * num_tokens
    inputs = residual * hidden * num_tokens
    # Two tensors of the MLP's width at once, and the stream around it.
    inside = (2 * compute * config.intermediate_size + residual * hidden) * num_tokens
    if not full and compute < stored:  # peft widens what an adapter reads to the adapter's type
        inside += stored * config.intermediate_size * num_tokens
    cast_layers = layers if full or not activation_checkpointing else 0
    return Memory(
        weights=trained if full else parameters.frozen_bytes,
        adapter=0 if full else trained,
        frozen_copy=trained * (frozen_copy and full),
        optimizer=optimizer_states(optimizer) * trained,
        gradients=trained * (accumulates + (num_ranks > 1)),
        activations=int(layers * (inputs if activation_checkpointing else kept)),
        weight_casts=int(layer.fixed * cast_layers),
        backward=int(inside + (kept + layer.fixed) * activation_checkpointing),
        head=full * 4 * hidden * vocabulary,
        chunk=(2 + full) * residual * hidden * labelled
        + _chunk_bytes(config, labelled, stored=stored, compute=compute, full=full),
    )


def _chunk_bytes(
    config: LlamaConfig, labelled: int, *, stored: int, compute: int, full: bool
) -> int:
    vocabulary = config.vocab_size
    rows = min(labelled, max(1, CHUNK_ELEMENTS // vocabulary))
    # Logits, in fp32 as well, their softmax, and the gradient of the chunk before; or, a moment
    # later, a chunk's gradient and what it adds to the head's.
    widened = 4 * (compute != 4)
    softmax = rows * vocabulary * (compute + widened + 4 + compute * (rows < labelled))
    head = compute * config.hidden_size * vocabulary
    product = compute * rows * vocabulary + head * full
    return max(softmax, product) + head * (compute != stored)


def largest_pack(peak: Callable[[int], int], memory: float, *, step: int = 256) -> int:
    """The most tokens, a multiple of `step`, whose peak fits a card; 0 where none do.

    Args:
        peak: tokens -> bytes, growing.
        memory: bytes of the card.
    """
    room = usable(memory)
    low, high = 0, 1
    while peak(high * step) <= room:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if peak(middle * step) <= room else (low, middle)
    return low * step


def usable(memory: float) -> float:
    """Bytes for tensors of a card's `memory` bytes."""
    return (memory - CONTEXT_BYTES) * USABLE_SHARE


def count_layer(build: Callable[[int], nn.Module], *, precision: str) -> Layer:
    """What a layer keeps, counted in forward passes of models of one layer and two.

    Args:
        build: number of layers -> model on the CPU, a `SmolLM2ForCausalLM` or one under an adapter;
            its weights may be anything and its vocabulary tiny.
        precision: a key of `PRECISIONS`.
    """
    counts = []
    for num_layers in (1, 2):
        model = build(num_layers).train()
        if precision == "bf16":
            model = model.bfloat16()
        counts.append(
            [saved_bytes(model, t, precision) for t in (_COUNT_TOKENS, 2 * _COUNT_TOKENS)]
        )
    few, many = (two - one for one, two in zip(*counts, strict=True))
    per_token = (many - few) / _COUNT_TOKENS
    return Layer(per_token=per_token, fixed=few - per_token * _COUNT_TOKENS)


class _Kept:
    """A tensor that autograd holds; gone when the graph lets go of it."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


def saved_bytes(model: nn.Module, num_tokens: int, precision: str) -> int:
    """Bytes that autograd holds after a forward pass over one document, parameters excluded."""
    kept: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> _Kept:
        one = _Kept(tensor)
        kept.add(one)
        return one

    ids = torch.zeros(1, num_tokens, dtype=torch.long)
    positions = torch.arange(num_tokens)[None]
    batch = {
        "input_ids": ids,
        "position_ids": positions,
        "labels": ids.masked_fill(positions == 0, -100),
        "cu_seqlens": torch.tensor([0, num_tokens], dtype=torch.int32),
        "max_seqlen": num_tokens,
        "num_loss_tokens": num_tokens - 1,
    }
    with autocast(precision), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x.tensor):
        loss = model(**batch).loss
    own = {x.untyped_storage().data_ptr() for x in model.parameters()}
    storages = {x.tensor.untyped_storage().data_ptr(): x.tensor.untyped_storage() for x in kept}
    assert loss.requires_grad
    return sum(storage.nbytes() for at, storage in storages.items() if at not in own)


def autocast(precision: str, device: str = "cpu") -> AbstractContextManager[Any]:
    """As the trainer sets it, but bf16 for amp_fp16, which is as wide."""
    if not precision.startswith("amp_"):
        return nullcontext()
    return torch.autocast(device, torch.bfloat16)
