"""FlexAttention over documents laid end to end: any GPU, any dtype, any mask.

On a CPU it runs uncompiled, with all T x T scores, and is useful only as a reference.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

LEAST_HEAD = 16
"""Dimensions of a head, at least, which the compiled kernel requires."""


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)  # pyright: ignore[reportReturnType]


@functools.lru_cache(maxsize=2)
@torch.inference_mode(False)  # autograd refuses inference tensors, if a training step is next
def document_mask(cu_seqlens: Tensor, _version: Hashable, num_tokens: int):
    """Return the block mask of causal attention within documents, made once per microbatch.

    Tensors hash by identity; `_version` tells apart the contents of a buffer that is written again.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    token = torch.arange(num_tokens, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens, token, right=True)

    def same_document_causal(_batch, _head, query, key):
        return (document[query] == document[key]) & (query >= key)

    return create_block_mask(
        same_document_causal, None, None, num_tokens, num_tokens, device=str(cu_seqlens.device)
    )


@torch.compiler.disable  # compiled on its own, with a mask made once per microbatch
def flex_varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Compute causal attention within each document; arguments are `varlen_attention`'s."""
    # Inference tensors have no version.
    version = tuple(cu_seqlens.tolist()) if cu_seqlens.is_inference() else cu_seqlens._version
    return flex_attention(q, k, v, document_mask(cu_seqlens, version, q.shape[0]))


def flex_attention(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    """Compute attention with a block mask: q [T, H, N], k and v [T, K, N] -> [T, H, N]."""
    if q.device.type == "cuda":
        attend = _compiled_flex()
    else:
        from torch.nn.attention.flex_attention import flex_attention as attend
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    # Its other kernel, used below 128 tokens, needs H/K to be a power of two.
    options = {"FORCE_USE_FLEX_ATTENTION": True}
    out = attend(q, k, v, block_mask=mask, enable_gqa=True, kernel_options=options)
    return out[0].transpose(0, 1)
