"""Floating-point operations of a training step, and what GPUs can do: for model FLOPs utilisation.

Counts matrix products only, as is usual: a product [m, k] x [k, n] is 2mkn. Attention is counted as
it must be done, causal and within documents, so it grows with the sum of squared lengths. Left out:
norms, rotary, softmax and the optimizer, some per cent at these sizes; and what is recomputed, for
MFU counts useful work. Compared with torch's FlopCounterMode in tests/models/test_flops.py.
"""

from transformers import LlamaConfig

# Dense bf16 tensor-core peaks without sparsity, FLOP/s, from NVIDIA's data sheets and, for consumer
# GPUs, the Ampere GA102 and Ada white papers' figures with fp32 accumulation. Cited from memory and
# from the project's notes; look them up before quoting an MFU.
PEAK_FLOPS = {
    "H200": 989.4e12,  # H200 data sheet
    "H100 PCIe": 756.5e12,  # H100 data sheet
    "H100": 989.4e12,  # H100 SXM data sheet
    "A100": 312e12,  # A100 data sheet
    "L40S": 362.05e12,  # L40S data sheet
    "RTX 4090": 165.2e12,  # Ada white paper
    "RTX 3090": 71.2e12,  # GA102 white paper
}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak in FLOP/s of a GPU by `torch.cuda.get_device_name()`; None if not known."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


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


def training_flops(
    config: LlamaConfig,
    *,
    num_tokens: int,
    num_loss_tokens: int,
    sum_squared_lengths: int,
    frozen_base: bool = False,
) -> float:
    """Operations of forward and backward pass.

    The backward pass takes two products for each of the forward: one for the gradient of the input,
    one for the gradient of the weight, which frozen weights do not need. With `frozen_base` the
    adapters' own products, under a few per cent at usual ranks, are left out.
    """
    parts = forward_flops(
        config,
        num_tokens=num_tokens,
        num_loss_tokens=num_loss_tokens,
        sum_squared_lengths=sum_squared_lengths,
    )
    weights = 2.0 if frozen_base else 3.0
    return weights * (parts["linear"] + parts["head"]) + 3.0 * parts["attention"]
