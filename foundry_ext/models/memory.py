"""An estimate of a training step's memory, from its parts, before training.

Weights, gradients and optimizer state are counted from the configuration, and activations by
running a layer, see activations.py. The loss is a formula that follows loss.py. Tests compare with
the allocator on a CPU, and with torch's allocator for a GPU that computes nothing (tests/nullgpu).
No GPU was measured: its flash kernels save the same tensors (queries, keys, values, output).

T tokens of a microbatch, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

from torch import nn
from transformers.models.llama import LlamaConfig

from foundry_ext.models.activations import Layer
from foundry_ext.models.loss import chunk_rows
from foundry_ext.utils.errors import UserError

GIB = 2**30
# Memory of a card as torch reports it, in GiB.
CARDS = {
    "RTX 3090 24 GB": 23.6,
    "RTX 4090 24 GB": 23.6,
    "A100 40 GB": 39.4,
    "A100 80 GB": 79.2,
    "H100 80 GB": 79.2,
    "H200 141 GB": 139.8,
}
# Memory not available to tensors: CUDA's context and the kernels' workspaces take about 1 GiB, and
# the allocator's blocks are never all full. These are assumptions, not measurements.
CONTEXT_BYTES = GIB
USABLE_SHARE = 0.92

HEAP_GROWTH = 1.75
"""Largest memory of a process that trains on a CPU, beyond its imports, over the estimated peak.

glibc's heap keeps gaps between blocks that packs of different sizes cannot use again. Measured with
packs of 2,048 tokens: 1.49 (full fine-tuning), 1.73 (LoRA); of 512: 1.46 (LoRA).
"""

# Bytes per element of weights, of products, and of the residual stream between layers, which
# autocast keeps in the dtype of the weights.
PRECISIONS = {"fp32": (4, 4, 4), "amp_bf16": (4, 2, 4), "amp_fp16": (4, 2, 4), "bf16": (2, 2, 2)}
# Number of states of the trained parameters' size, by a part of the optimizer's name.
OPTIMIZER_STATES = {"lion": 1, "adam": 2, "sgd": 0}


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Parameter counts including the adapter; `frozen` is the base model under it."""

    trainable: int
    frozen: int
    trainable_bytes: int
    frozen_bytes: int

    @classmethod
    def of(cls, model: nn.Module) -> "Parameters":
        """Count a model's parameters, tied weights once; it may be on the meta device."""
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
    """Bytes by part at the moment when a step needs the most memory."""

    weights: int
    """Weights of the model without an adapter."""
    adapter: int
    frozen_copy: int
    """Copy of the base model, the reference for KL in full fine-tuning."""
    optimizer: int
    gradients: int
    """Gradients of earlier microbatches, if a batch has several; DDP's buckets double them."""
    activations: int
    """Tensors that all layers save for the backward pass; with checkpointing only their inputs."""
    weight_casts: int
    """Copies of weights in the dtype that autocast computes in."""
    backward: int
    """Gradients inside a layer and, with checkpointing, its recomputed activations. They do not
    exist at the same time as `chunk`."""
    head: int
    """Gradient of the head's weight."""
    chunk: int
    """Hidden states at labelled positions, and the logits of one chunk of them with their
    temporaries."""

    @property
    def peak(self) -> int:
        """Bytes held at once at the most."""
        parts = asdict(self)
        backward, chunk = parts.pop("backward"), parts.pop("chunk")
        return sum(parts.values()) + max(backward, chunk)


def optimizer_states(name: str) -> int:
    """Return how many states of the trained parameters' size an optimizer keeps.

    Raises:
        UserError: the optimizer is unknown.
    """
    for part, count in OPTIMIZER_STATES.items():
        if part in name.lower():
            return count
    raise UserError(
        f"optimizer.name: {name!r} is unknown; memory can be estimated for optimizers whose name"
        f" contains {', '.join(OPTIMIZER_STATES)}"
    )


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
    device: str = "cuda",
) -> Memory:
    """Return the memory that a training step needs on one device.

    Args:
        config: shape of the model.
        layer: result of `count_layer` for this model and precision.
        parameters: the model's, including an adapter's.
        num_tokens: T, computed tokens of a microbatch, padding included.
        num_loss_tokens: labelled tokens of a microbatch; T by default.
        precision: a key of `PRECISIONS`, as the trainer names it, or bf16 for weights in bf16.
        optimizer: its name in the YAML.
        activation_checkpointing: whether layers are recomputed in the backward pass.
        frozen_copy: whether full fine-tuning keeps a copy of the base model.
        accumulates: whether a device's batch has several microbatches.
        num_ranks: number of ranks of DDP; sharding by FSDP is not estimated.
        device: its type, which decides the size of the loss's chunks.
    """
    stored, compute, residual = PRECISIONS[precision]
    hidden, vocabulary, layers = config.hidden_size, config.vocab_size, config.num_hidden_layers
    labelled = num_tokens if num_loss_tokens is None else num_loss_tokens
    full, trained = parameters.is_full, parameters.trainable_bytes
    saved = layer.per_token * num_tokens
    inputs = residual * hidden * num_tokens
    # Two tensors of the MLP's width at once, and the residual stream.
    inside = (2 * compute * config.intermediate_size + residual * hidden) * num_tokens
    cast_layers = layers if full or not activation_checkpointing else 0
    return Memory(
        weights=trained if full else parameters.frozen_bytes,
        adapter=0 if full else trained,
        frozen_copy=trained * (frozen_copy and full),
        optimizer=optimizer_states(optimizer) * trained,
        gradients=trained * (accumulates + (num_ranks > 1)),
        activations=int(layers * (inputs if activation_checkpointing else saved)),
        weight_casts=int(layer.fixed * cast_layers),
        backward=int(inside + (saved + layer.fixed) * activation_checkpointing),
        head=full * 4 * hidden * vocabulary,
        chunk=(2 + full) * residual * hidden * labelled
        + _chunk_bytes(
            config,
            labelled,
            chunk_rows(vocabulary, device),
            stored=stored,
            compute=compute,
            full=full,
        ),
    )


def _chunk_bytes(
    config: LlamaConfig, labelled: int, most: int, *, stored: int, compute: int, full: bool
) -> int:
    vocabulary, rows = config.vocab_size, min(labelled, most)
    # First logits, their fp32 copy, their softmax and the gradient of the previous chunk; later the
    # chunk's gradient and its product for the head's gradient. The larger of the two counts.
    widened = 4 * (compute != 4)
    softmax = rows * vocabulary * (compute + widened + 4 + compute * (rows < labelled))
    head = compute * config.hidden_size * vocabulary
    product = compute * rows * vocabulary + head * full
    return max(softmax, product) + head * (compute != stored)


def largest_pack(peak: Callable[[int], int], memory: float, *, step: int = 256) -> int:
    """Return the most tokens whose peak memory fits a card; 0 if none do.

    Args:
        peak: an increasing function from tokens to bytes.
        memory: bytes of the card.
        step: the result is a multiple of this.
    """
    limit = usable(memory)
    low, high = 0, 1
    while peak(high * step) <= limit:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if peak(middle * step) <= limit else (low, middle)
    return low * step


def usable(memory: float) -> float:
    """Return the bytes available to tensors on a card of `memory` bytes."""
    return (memory - CONTEXT_BYTES) * USABLE_SHARE
