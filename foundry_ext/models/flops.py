"""Floating-point operations of a training step, and what GPUs can do: for model FLOPs utilisation.

Counts matrix products only, as is usual: a product [m, k] x [k, n] is 2mkn. Attention is counted as
it must be done, causal and within documents, so it grows with the sum of squared lengths. Left out:
norms, rotary, softmax and the optimizer, some per cent at these sizes; and what is recomputed, for
MFU counts useful work. Compared with torch's FlopCounterMode in tests/models/test_flops.py.
"""

import re
from typing import Any

from torch import nn
from transformers import LlamaConfig

# Dense bf16 tensor-core peaks with fp32 accumulation and without sparsity, FLOP/s, by words of the
# device's name; the first entry whose words are all there counts. Figures and sources were compared
# on 2026-11-26 with Composer's and other projects' tables, not with NVIDIA's own files, which no
# network led to; tests/models/test_flops.py derives most from multiprocessors, products and clock.
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
# Other chips, clocks or memory under the name of one above, or a slice of it.
_OTHER_CARDS = {"Ti", "D", "SUPER", "Laptop", "Mobile", "Max-Q", "MIG"}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak in FLOP/s of a GPU by `torch.cuda.get_device_name()`; None if not known.

    Whole words are compared: an A100 is no A10, a GH200 no H200, and an RTX 3090 Ti no RTX 3090.
    """
    words = {*re.split(r"[\s/]+", device_name), *re.split(r"[\s/-]+", device_name)}
    if words & _OTHER_CARDS:
        return None
    return next((peak for name, peak in PEAK_FLOPS.items() if words.issuperset(name)), None)


def forward_flops(
    config: LlamaConfig, *, num_tokens: int, num_loss_tokens: int, sum_squared_lengths: int
) -> dict[str, float]:
    """Operations of a forward pass by part: `linear`, `attention`, `head`.

    Args:
        num_tokens: T, real tokens.
        num_loss_tokens: positions at which the head runs.
        sum_squared_lengths: sum over documents of length squared.
    """
    hidden, width = config.hidden_size, config.intermediate_size
    query = config.num_attention_heads * config.head_dim
    key_value = config.num_key_value_heads * config.head_dim
    layer = hidden * (2 * query + 2 * key_value) + 3 * hidden * width
    # Scores and their product with the values, each over half a square.
    attention = 2 * 2 * query * sum_squared_lengths / 2
    return {
        "linear": 2.0 * layer * num_tokens * config.num_hidden_layers,
        "attention": float(attention * config.num_hidden_layers),
        "head": 2.0 * hidden * config.vocab_size * num_loss_tokens,
    }


def adapter_parameters(model: nn.Module) -> int:
    """Elements of the matrices A and B of peft's LoRA layers, whole ones where FSDP shards them."""
    layers: list[Any] = [one for one in model.modules() if hasattr(one, "lora_A")]
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
    """Operations of forward and backward pass.

    The backward pass takes two products for each of the forward: one for the gradient of the input,
    one for the gradient of the weight, which frozen weights do not need.

    Args:
        frozen_base: only an adapter is trained.
        adapter_parameters: see there; each is in one product a token, forward. On all seven linears
            of SmolLM2-135M rank 64 adds 22 % to the other products of a frozen base, rank 256 87 %.
            DoRA's norms of W + BA, a product a step and not a token, are left out.
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
