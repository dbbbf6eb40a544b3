"""Causal attention within documents by torch's own fused CPU kernel, a document at a time.

The kernel is FlashAttention as `scaled_dot_product_attention` runs it on a CPU. It is called on
views of the pack: a key/value head is a batch of its group's query heads, with stride 0 over the
group, so that nothing is repeated or transposed in memory. The outputs are those of "sdpa" to the
last bit; the gradients of k and v are summed over the group in fp32.

Forward and backward are one custom operator each, which torch.compile does not trace into.

T tokens, L of them in a document, H query heads, K key/value heads, G = H/K, N head dimension.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

_ATEN: Any = torch.ops.aten
# In bf16 the kernel's backward pass costs a millisecond or more however short the document is. In
# fp32 it is 6 times as fast at 16 to 32 tokens, as fast at 384, slower above (Xeon with AMX).
_FP32_BELOW = 384  # tokens


@torch.library.custom_op("foundry_ext::torch_cpu_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the attended values [T, H, N] and the logarithms of the softmaxes' sums [T, H]."""
    q, k, v = (_dense(x) for x in (q, k, v))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    log_sum = torch.empty(q.shape[:2], device=q.device)
    for rows in _documents(cu_seqlens):
        attended, log_sum_KGL = _ATEN._scaled_dot_product_flash_attention_for_cpu(
            *_views(q[rows], k[rows], v[rows]), is_causal=True
        )
        _by_group(out[rows], k.shape[1]).copy_(attended)
        _sums_by_group(log_sum[rows], k.shape[1]).copy_(log_sum_KGL)
    return out, log_sum


@torch.library.custom_op("foundry_ext::torch_cpu_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum: Tensor,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v in their dtypes."""
    grad, q, k, v = (_dense(x) for x in (grad, q, k, v))
    num_kv_heads = k.shape[1]
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    for rows in _documents(cu_seqlens):
        inputs = [x[rows] for x in (grad, q, k, v, out)]
        if rows.stop - rows.start < _FP32_BELOW:
            inputs = [x.float() for x in inputs]
        grad_in, q_in, k_in, v_in, out_in = inputs
        found = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
            _by_group(grad_in, num_kv_heads),
            *_views(q_in, k_in, v_in),
            _by_group(out_in, num_kv_heads),
            _sums_by_group(log_sum[rows], num_kv_heads),
            dropout_p=0.0,
            is_causal=True,
        )
        grad_q, *grads_kv = (x[rows] for x in grads)
        _by_group(grad_q, num_kv_heads).copy_(found[0])
        for x, by_query_head in zip(grads_kv, found[1:], strict=True):
            x.copy_(by_query_head.sum(1, dtype=torch.float32).transpose(0, 1))
    return grads[0], grads[1], grads[2]


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor):
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, torch.empty(q.shape[:2], device=q.device)


@_backward.register_fake
def _(grad, q: Tensor, k: Tensor, v: Tensor, out, log_sum, cu_seqlens):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save(ctx, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad: Tensor, _grad_log_sum: None):
    return *_backward(grad, *ctx.saved_tensors), None


_forward.register_autograd(_gradients, setup_context=_save)


def torch_cpu_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Compute causal attention within each document.

    Args:
        q: [T, H, N].
        k: [T, K, N], in the dtype of q.
        v: [T, K, N], in the dtype of q.
        cu_seqlens: [D+1] int32.

    Returns:
        [T, H, N] in the dtype of q.
    """
    return _forward(q, k, v, cu_seqlens)[0]


def _dense(x: Tensor) -> Tensor:
    """Return `x` as the kernel reads it: it ignores the stride of the last dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _documents(cu_seqlens: Tensor) -> Iterator[slice]:
    return (slice(start, end) for start, end in pairwise(cu_seqlens.tolist()) if end > start)


def _by_group(x_LHN: Tensor, num_kv_heads: int) -> Tensor:
    """View the heads by their group: [L, H, N] -> [K, G, L, N]."""
    return x_LHN.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)


def _sums_by_group(x_LH: Tensor, num_kv_heads: int) -> Tensor:
    """View [L, H] as [K, G, L]."""
    return x_LH.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0)


def _views(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """View q, k and v as [K, G, L, N]."""
    num_kv_heads = k.shape[1]
    groups = q.shape[1] // num_kv_heads
    k, v = (_by_group(x, num_kv_heads).expand(-1, groups, -1, -1) for x in (k, v))
    return _by_group(q, num_kv_heads), k, v
