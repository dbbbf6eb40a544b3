"""The time of a training step, predicted from what it asks of a device.

An operator takes as long as the slowest of its products, its traffic and its launch. A step takes
as long as its operators together or, on a GPU, as the host needs to launch them. What is asked is
counted (work.py); how much of a card's peak is reached is assumed, because no card was measured.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from transformers.models.llama import LlamaConfig

from foundry_ext.models.flops import peak_flops
from foundry_ext.preflight.plan.operators import Op
from foundry_ext.preflight.plan.work import StepWork

# Memory bandwidth in bytes/s, from NVIDIA's data sheets, as copied by others.
BANDWIDTH = {
    "RTX 3090 24 GB": 936e9,
    "RTX 4090 24 GB": 1008e9,
    "A100 40 GB": 1555e9,
    "A100 80 GB": 2039e9,
    "H100 80 GB": 3350e9,
    "H200 141 GB": 4800e9,
}
# Shares of the peak that products, attention and memory reach: assumptions from published
# measurements of FlashAttention-2 and cuBLAS, lower where a card is too fast for these shapes.
_SMALL_CARD, _LARGE_CARD = (0.80, 0.50, 0.85), (0.65, 0.40, 0.80)
_LARGE = ("A100", "H100", "H200")
_LEAST_SECONDS = 2e-6  # of a kernel
_HOST_SECONDS = 12e-6  # of the host per operator, counted on tests/nullgpu with an EPYC


@dataclass(frozen=True, kw_only=True)
class Device:
    """Rates that a device reaches."""

    product_flops: float
    """FLOP/s in matrix products."""
    attention_flops: float
    bandwidth: float
    """Bytes/s."""
    least_seconds: float = 0.0
    """Least time of an operator on the device, however small."""
    host_seconds: float = 0.0
    """Time of the host per operator."""
    overlaps: bool = True
    """Whether the device computes while the host launches, as a GPU does."""


def card(name: str) -> Device | None:
    """Return the device of a card's name in models/memory.py; None if its rates are unknown."""
    peak, bandwidth = peak_flops(name), BANDWIDTH.get(name)
    if peak is None or bandwidth is None:
        return None
    product, attention, memory = _LARGE_CARD if name.startswith(_LARGE) else _SMALL_CARD
    return Device(
        product_flops=product * peak,
        attention_flops=attention * peak,
        bandwidth=memory * bandwidth,
        least_seconds=_LEAST_SECONDS,
        host_seconds=_HOST_SECONDS,
    )


@dataclass
class Step:
    """A step's time on one device, summed over its operators."""

    device: Device
    seconds: float = 0.0
    """Time of the operators on the device."""
    operators: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    """Seconds of the operators by kind."""

    def add(self, ops: Iterable[Op], num_tokens: float, times: float = 1.0) -> None:
        """Add operators for a number of tokens, so many times; negative times take them away."""
        for op in ops:
            flops, size = op.at(num_tokens)
            self.add_one(op.kind, flops, size, times)

    def add_one(self, kind: str, flops: float, size: float, times: float = 1.0) -> None:
        """Add an operator of so many FLOPs and bytes."""
        device = self.device
        rate = device.attention_flops if kind == "attention" else device.product_flops
        taken = times * max(flops / rate, size / device.bandwidth, device.least_seconds)
        self.seconds += taken
        self.operators += times
        self.parts[kind] = self.parts.get(kind, 0.0) + taken

    @property
    def total(self) -> float:
        """Seconds of the step."""
        host = self.operators * self.device.host_seconds
        return max(self.seconds, host) if self.device.overlaps else self.seconds + host


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """One microbatch of a step."""

    num_tokens: float
    """Computed tokens, padding included."""
    num_loss_tokens: float
    sum_squared_lengths: float


def predict(
    device: Device,
    work: StepWork,
    config: LlamaConfig,
    microbatch: Microbatch,
    *,
    num_microbatches: float,
    chunk_rows: int,
    trained_bytes: float,
    optimizer_states: int,
    clips: bool,
    trains_embedding: bool,
    activation_checkpointing: bool = False,
) -> Step:
    """Predict a step of packed training.

    Args:
        device: its rates.
        work: counted for this model.
        config: the model's shape.
        microbatch: the mean one.
        num_microbatches: of a step.
        chunk_rows: rows of logits that the loss computes at a time on this device.
        trained_bytes: size of the trained parameters.
        optimizer_states: how many tensors of that size the optimizer keeps.
        clips: whether the gradient's norm is clipped.
        trains_embedding: whether the embedding, and with it the head, is trained.
        activation_checkpointing: whether layers are computed again in the backward pass.
    """
    step = Step(device)
    tokens, times = microbatch.num_tokens, num_microbatches
    # The second model has a layer more; what is left of the first one is what surrounds
    # the layers.
    step.add(work.one_layer, tokens, 2 * times)
    step.add(work.two_layers, tokens, -times)
    chunks, rest = divmod(microbatch.num_loss_tokens, chunk_rows)
    step.add(work.loss, chunk_rows, chunks * times)
    if rest:
        step.add(work.loss, rest, times)
    layers = config.num_hidden_layers * times * (4 / 3 if activation_checkpointing else 1)
    if work.compiled is None:
        step.add(work.two_layers, tokens, layers)
        step.add(work.one_layer, tokens, -layers)
    else:
        step.add(work.compiled, tokens, layers)
    # Two products forward, five backward, each over half a square.
    heads = config.num_attention_heads * config.head_dim
    attention = 3.5 * 2 * 2 * heads * microbatch.sum_squared_lengths / 2
    step.add_one("attention", attention, 0.0, layers)
    if trains_embedding:  # its gradient [V, D] is filled with zeros, and added to the head's
        step.add_one("pass", 0.0, 4 * 4 * config.vocab_size * config.hidden_size, times)
    # The optimizer reads weights, gradients and states, and writes all but gradients. Clipping
    # reads the gradients, and scales them; every further microbatch is added to them.
    passes = 2 + 1 + 2 * optimizer_states + 3 * clips + 3 * (num_microbatches - 1)
    step.add_one("pass", 0.0, passes * trained_bytes)
    return step
