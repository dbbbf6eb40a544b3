"""Causal attention within documents by plain matrix products, a block of queries at a time.

This is the backend for training on a CPU. Unlike `scaled_dot_product_attention` per document, it
does not repeat key/value heads for their groups, skips keys after a block's last query, and saves
only q, k and v: the backward pass computes the weights again, as FlashAttention does. In bf16 that
is 1.3 to 3 times faster, in fp32 as fast or slightly faster; see benchmarks/RESULTS.md.

Forward and backward are one custom operator each, which torch.compile does not trace into, because
it can follow neither unknown lengths nor a loop over them.

T tokens, L of them in a document, H query heads, K key/value heads, G = H/K, N head dimension.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

# Queries per block. A larger block computes more scores that are masked, a smaller one makes small
# products. Of 64, 128 and 256, 64 is the fastest or ties at every length from 100 tokens to 2048.
BLOCK = 64


@torch.library.custom_op("foundry_ext::blockwise_attention", mutates_args=())
def blockwise_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Compute causal attention within each document.

    Args:
        q: [T, H, N].
        k: [T, K, N], in the dtype of q.
        v: [T, K, N], in the dtype of q.
        cu_seqlens: [D+1] int32.

    Returns:
        [T, H, N] in the dtype of q.
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for start, end in _documents(cu_seqlens):
        q_KLGN, k_KLN, v_KLN = _by_head(q[start:end], k[start:end], v[start:end])
        for rows in _blocks(end - start):
            weights = _weights(q_KLGN, k_KLN, rows).to(v.dtype)
            attended = torch.bmm(weights, v_KLN[:, : rows.stop])
            out[start:end][rows] = _to_tokens(attended, rows, q.shape)
    return out


@torch.library.custom_op("foundry_ext::blockwise_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v in their dtypes; those of k and v are summed in fp32."""
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    grad_k, grad_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    for start, end in _documents(cu_seqlens):
        document = slice(start, end)
        q_KLGN, k_KLN, v_KLN = _by_head(q[document], k[document], v[document])
        grad_KLGN = _grouped(grad[document], k.shape[1])
        sum_k, sum_v = (torch.zeros(k_KLN.shape, device=k.device) for _ in range(2))
        for rows in _blocks(end - start):
            keys = slice(0, rows.stop)
            weights = _weights(q_KLGN, k_KLN, rows)
            grad_block = grad_KLGN[:, rows].flatten(1, 2)
            sum_v[:, keys] += torch.bmm(weights.to(v.dtype).transpose(1, 2), grad_block)
            grad_weights = torch.bmm(grad_block, v_KLN[:, keys].transpose(1, 2)).float()
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, torch.float32)
            grad_scores = grad_scores.to(q.dtype)
            by_query = torch.bmm(grad_scores, k_KLN[:, keys]) * _scale(q)
            grad_q[document][rows] = _to_tokens(by_query, rows, q.shape)
            sum_k[:, keys] += torch.bmm(grad_scores.transpose(1, 2), q_KLGN[:, rows].flatten(1, 2))
        grad_k[document], grad_v[document] = sum_k.transpose(0, 1), sum_v.transpose(0, 1)
    return grad_q, grad_k, grad_v


@blockwise_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad: Tensor):
    return *_backward(grad, *ctx.saved_tensors), None


blockwise_attention.register_autograd(_gradients, setup_context=_save)


def _documents(cu_seqlens: Tensor) -> Iterator[tuple[int, int]]:
    return ((start, end) for start, end in pairwise(cu_seqlens.tolist()) if end > start)


def _blocks(length: int) -> Iterator[slice]:
    return (slice(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK))


def _scale(q: Tensor) -> float:
    return q.shape[-1] ** -0.5


def _grouped(x_LHN: Tensor, num_key_value_heads: int) -> Tensor:
    """Group the queries of each key/value head, by token: [L, H, N] -> [K, L, G, N]."""
    return x_LHN.unflatten(1, (num_key_value_heads, -1)).transpose(0, 1).contiguous()


def _by_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q [K, L, G, N], scaled, and k, v [K, L, N]."""
    k_KLN, v_KLN = (x.transpose(0, 1).contiguous() for x in (k, v))
    return _grouped(q * _scale(q), k.shape[1]), k_KLN, v_KLN


def _weights(q_KLGN: Tensor, k_KLN: Tensor, rows: slice) -> Tensor:
    """Return attention weights [K, rows * G, rows.stop] in fp32, masked causally."""
    queries = q_KLGN[:, rows]
    scores = torch.bmm(queries.flatten(1, 2), k_KLN[:, : rows.stop].transpose(1, 2))
    size, groups = queries.shape[1:3]
    later = torch.ones(size, size, dtype=torch.bool, device=scores.device).triu_(1)
    by_query = scores.unflatten(1, (size, groups))
    by_query[..., rows.start :].masked_fill_(later[:, None], -torch.inf)
    return torch.softmax(scores, -1, dtype=torch.float32)


def _to_tokens(x: Tensor, rows: slice, shape: torch.Size) -> Tensor:
    """Put heads back beside their tokens: [K, rows * G, N] -> [rows, H, N]."""
    size = rows.stop - rows.start
    return x.unflatten(1, (size, -1)).transpose(0, 1).reshape(size, *shape[1:])
