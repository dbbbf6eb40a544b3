"""Attention over a key/value cache by a dense mask, which serves every setting of `generate`.

models/greedy.py is the fast path of evaluation.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from foundry_ext.models.decoder import SmolLM2Model


def run_cached(
    model: SmolLM2Model,
    hidden: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Cache,
    cache_position: Tensor | None,
) -> Tensor:
    """Run the layers on new positions, prefill or decoding, and add them to the cache.

    One `cu_seqlens` cannot describe one query over many cached keys, so the mask is dense.

    Args:
        model: the decoder.
        hidden: [B, S, D], the embedded tokens of S new positions.
        attention_mask: [B, past + S] of ones and zeros; None for no padding.
        position_ids: [B, S]; None to count the tokens of the mask.
        cache: keys and values of `past` positions, changed in place.
        cache_position: [S], whose first value is `past`; None to ask the cache.

    Returns:
        [B, S, D] before the final norm.
    """
    batch, seq_len = hidden.shape[:2]
    past = cache.get_seq_length() if cache_position is None else int(cache_position[0])
    key = torch.arange(past + seq_len, device=hidden.device)
    query = key[past:, None]
    if attention_mask is None:
        attention_mask = torch.ones(batch, past + seq_len, device=hidden.device)
    is_token = attention_mask.bool()
    if position_ids is None:
        position_ids = (is_token.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
    mask = ((query >= key) & is_token[:, None])[:, None]  # [B, 1, S, past + S]
    # A padding token would see nothing, and a softmax over nothing is NaN: let it see itself.
    mask = mask | (query == key)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = cache.update(k.transpose(1, 2), v.transpose(1, 2), layer)
        return F.scaled_dot_product_attention(
            q.transpose(1, 2), k, v, attn_mask=mask, enable_gqa=True
        ).transpose(1, 2)

    return model(hidden, position_ids, lambda layer: partial(attend, layer))
