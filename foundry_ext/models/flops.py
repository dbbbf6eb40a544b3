"""FLOPs of a training step and peak FLOP/s of GPUs, for model FLOPs utilisation (MFU).

Only matrix products are counted, as is usual: [m, k] x [k, n] is 2mkn. Attention is counted as
causal and within documents, so it grows with the sum of squared lengths. Not counted are norms,
rotary, softmax and the optimizer, a few per cent at these sizes, and recomputation, because MFU
measures useful work. tests/models/test_flops.py compares with torch's FlopCounterMode.
"""

import re
from typing import Any

from torch import nn
from transformers import LlamaConfig

# Dense bf16 tensor-core peaks in FLOP/s, with fp32 accumulation and without sparsity. The key holds
# words of the device's name; the first entry whose words are all present counts. Figures and
# sources were compared on 2026-11-26 with the tables of Composer and other projects, not with
# NVIDIA's own files, which could not be downloaded. tests/models/test_flops.py derives most of them
# from the number of multiprocessors, their products per cycle and the clock.
PEAK_FLOPS = {
    ("B200",): 2250e12,  # NVIDIA Blackwell brief, HGX B200 at 1000 W: 4.5 PFLOP/s sparse
    ("H200", "NVL"): 835.5e12,  # H200 data sheet: 1,671 sparse
    ("H200",): 989.4e12,  # H200 data sheet, SXM: 1,979 sparse
    ("H100", "PCIe"): 756.5e12,  # H100 data sheet: 1,513 sparse
    ("H100", "NVL"): 835.5e12,  # H100 data sheet: 1,671 sparse
    ("H100",): 989.4e12,  # H100 data sheet, SXM: 1,979 sparse
    ("A100",): 312e12,  # A100 data sheet, SXM and PCIe
    ("L40S",): 362.05e12,  # L40S data sheet
    ("A10",): 125e12,  # A10 data sheet
    ("RTX", "5090"): 209.5e12,  # NVIDIA RTX Blackwell white paper, appendix
    ("RTX", "4090"): 165.2e12,  # NVIDIA Ada white paper, appendix
    ("RTX", "3090"): 71.2e12,  # NVIDIA Ampere GA102 white paper, appendix
}
# Words that mark another chip, clock or memory under a name above, or a slice of the card.
_OTHER_CARDS = {"Ti", "D", "SUPER", "Laptop", "Mobile", "Max-Q", "MIG"}


def peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 peak of a GPU in FLOP/s, or None if it is unknown.

    Args:
        device_name: as `torch.cuda.get_device_name()` returns it. Complete words are compared, so
            an A100 is not an A10, a GH200 not an H200, and an RTX 3090 Ti not an RTX 3090.
    """
    words = {*re.split(r"[\s/]+", device_name), *re.split(r"[\s/-]+", device_name)}
    if words & _OTHER_CARDS:
        return None
    return next((peak for name, peak in PEAK_FLOPS.items() if words.issuperset(name)), None)


def forward_flops(
    config: LlamaConfig, *, num_tokens: int, num_loss_tokens: int, sum_squared_lengths: int
) -> dict[str, float]:
    """Return the FLOPs of a forward pass by part: `linear`, `attention`, `head`.

    Args:
        config: shape of the model.
        num_tokens: real tokens, without padding.
        num_loss_tokens: positions at which the head runs.
        sum_squared_lengths: sum over documents of length squared.
    """
    hidden, width = config.hidden_size, config.intermediate_size
    query = config.num_attention_heads * config.head_dim
    key_value = config.num_key_value_heads * config.head_dim
    layer = hidden * (2 * query + 2 * key_value) + 3 * hidden * width
    # Scores and their product with the values, each over half a square (causal).
    attention = 2 * 2 * query * sum_squared_lengths / 2
    return {
        "linear": 2.0 * layer * num_tokens * config.num_hidden_layers,
        "attention": float(attention * config.num_hidden_layers),
        "head": 2.0 * hidden * config.vocab_size * num_loss_tokens,
    }


def adapter_parameters(model: nn.Module) -> int:
    """Return the number of elements of A and B in peft's LoRA layers, before any sharding."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "lora_A")]
    # From ranks and features: under FSDP numel() would count this rank's shard.
    return sum(
        layer.r[name] * (layer.in_features + layer.out_features)
        for layer in layers
        for name in layer.lora_A
    )


def training_flops(
    config: LlamaConfig,
    *,
    num_tokens: int,
    num_loss_tokens: int,
    sum_squared_lengths: int,
    frozen_base: bool = False,
    adapter_parameters: int = 0,
) -> float:
    """Return the FLOPs of a forward and backward pass.

    Each product of the forward pass takes two in the backward pass: one for the gradient of the
    input, and one for the gradient of the weight, which frozen weights do not need.

    The first arguments are those of `forward_flops`. `frozen_base` means that only an adapter is
    trained. Each of the `adapter_parameters` takes part in one product per token of the forward
    pass: on all seven linears of SmolLM2-135M, rank 64 adds 22 % to the other products of a frozen
    base, rank 256 87 %. DoRA's norms of W + BA, one product per step, are not counted.
    """
    parts = forward_flops(
        config,
        num_tokens=num_tokens,
        num_loss_tokens=num_loss_tokens,
        sum_squared_lengths=sum_squared_lengths,
    )
    weights = 2.0 if frozen_base else 3.0
    adapter = 3.0 * 2.0 * adapter_parameters * num_tokens
    return weights * (parts["linear"] + parts["head"]) + 3.0 * parts["attention"] + adapter
