"""Greedy continuation of several prompts, whose keys and values are in one cache.

Prompts are computed unpadded, as packed documents. Then every step adds a token to each row that
has not ended. The cache is made once, and a row that has ended makes room for the last one, so the
rows of a step are always the cache's first. transformers' own `generate` (sampling, beams, any
cache) works too, but copies the cache at each step and computes padding.

B rows, C positions of the cache, T prompt tokens, H query heads, K key/value heads, N head
dimension.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from foundry_ext.models.attention import varlen_attention
from foundry_ext.models.checks import check_ids
from foundry_ext.models.smollm2 import SmolLM2ForCausalLM

# Prompt tokens that are computed together, as many as in a training pack.
PREFILL_TOKENS = 8192

HasEnded = Callable[[Sequence[int]], bool]
"""Function from a row's new tokens to whether the row ends."""


class _Cache:
    """Keys and values of every layer, [B, K, C, N] each."""

    def __init__(self, num_layers: int, num_rows: int, num_positions: int):
        self.num_rows, self.num_positions = num_rows, num_positions
        self.layers: list[tuple[Tensor, Tensor] | None] = [None] * num_layers

    def write(
        self, layer: int, rows: Tensor, positions: Tensor, k_TKN: Tensor, v_TKN: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Put tokens into the cache, and return the layer's keys and values."""
        held = self.layers[layer]
        if held is None:  # only here is the dtype known, which autocast may choose
            num_heads, head_dim = k_TKN.shape[1:]
            shape = (self.num_rows, num_heads, self.num_positions, head_dim)
            # Zeros, because a weight of 0 times whatever memory holds may be NaN.
            held = self.layers[layer] = (k_TKN.new_zeros(shape), v_TKN.new_zeros(shape))
        for cached, x_TKN in zip(held, (k_TKN, v_TKN), strict=True):
            cached[rows, :, positions] = x_TKN
        return held

    def move(self, source: int, row: int, length: int) -> None:
        """Copy the first `length` positions of a row over another row."""
        for held in self.layers:
            assert held is not None
            for cached in held:
                cached[row, :, :length] = cached[source, :, :length]


@torch.no_grad()
def generate_greedily(
    model: SmolLM2ForCausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    has_ended: HasEnded,
) -> list[list[int]]:
    """Return the new tokens of each prompt, with the one after which `has_ended` says yes.

    The model is in evaluation mode, and prompts are not empty.
    """
    outputs: list[list[int]] = [[] for _ in prompts]
    cache = _Cache(
        model.config.num_hidden_layers, len(prompts), max(map(len, prompts)) + max_new_tokens
    )
    tokens = [
        token
        for rows in _groups(list(map(len, prompts)))
        for token in _prefill(model, cache, rows, [prompts[row] for row in rows])
    ]
    active = list(range(len(prompts)))  # the prompt in each row of the cache
    while True:
        for prompt, token in zip(active, tokens, strict=True):
            outputs[prompt].append(token)
        ended = [
            len(outputs[prompt]) == max_new_tokens or has_ended(outputs[prompt])
            for prompt in active
        ]
        for row in reversed([row for row, end in enumerate(ended) if end]):
            last = active.pop()
            if row < len(active):
                active[row] = last
                cache.move(len(active), row, len(prompts[last]) + len(outputs[last]) - 1)
        if not active:
            return outputs
        # The newest token of each row, whose keys are not in the cache yet, and its position.
        newest = [outputs[prompt][-1] for prompt in active]
        positions = [len(prompts[prompt]) + len(outputs[prompt]) - 1 for prompt in active]
        tokens = _decode(model, cache, newest, positions)


def _groups(lengths: Sequence[int]) -> Iterator[range]:
    """Yield rows that are computed together; a longer prompt is alone."""
    first = total = 0
    for row, length in enumerate(lengths):
        if total + length > PREFILL_TOKENS and row > first:
            yield range(first, row)
            first, total = row, 0
        total += length
    yield range(first, len(lengths))


def _prefill(
    model: SmolLM2ForCausalLM, cache: _Cache, rows: range, prompts: Sequence[Sequence[int]]
) -> list[int]:
    """Compute prompts, put them into these rows of the cache, and return each one's next token."""
    device = model.device
    lengths = [len(prompt) for prompt in prompts]
    ids = torch.cat([torch.as_tensor(prompt) for prompt in prompts]).to(device)
    positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
    row_of = torch.cat([torch.full((n,), row) for row, n in zip(rows, lengths, strict=True)]).to(
        device
    )
    ends = torch.tensor(lengths).cumsum(0)
    cu_seqlens = F.pad(ends, (1, 0)).to(device, torch.int32)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache.write(layer, row_of, positions, k, v)
        return varlen_attention(q, k, v, cu_seqlens, max(lengths), backend=model.attention_backend)

    hidden = _run(model, ids, positions, attend)
    return _next_tokens(model, hidden[(ends - 1).to(device)])


def _decode(
    model: SmolLM2ForCausalLM, cache: _Cache, tokens: Sequence[int], positions: Sequence[int]
) -> list[int]:
    """Compute one token of each of the first rows of the cache, and return the next ones."""
    device, num_rows, end = model.device, len(tokens), max(positions) + 1
    at = torch.tensor(positions, device=device)
    rows = torch.arange(num_rows, device=device)
    is_seen = (torch.arange(end, device=device) <= at[:, None])[:, None, None]  # [B, 1, 1, C]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = (x[:num_rows, :, :end] for x in cache.write(layer, rows, at, k, v))
        # A group of query heads stands where queries of one head do, so no key is repeated.
        q_BKGN = q.unflatten(1, (k.shape[1], -1))
        out = F.scaled_dot_product_attention(q_BKGN, keys, values, attn_mask=is_seen)
        return out.flatten(1, 2)

    hidden = _run(model, torch.tensor(tokens, device=device), at, attend)
    return _next_tokens(model, hidden)


def _run(
    model: SmolLM2ForCausalLM,
    ids: Tensor,
    positions: Tensor,
    attend: Callable[[int, Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    check_ids(ids, None, model.config.vocab_size)
    embedded = model.model.embed_tokens(ids)
    return model.model(embedded, positions, lambda layer: partial(attend, layer))


def _next_tokens(model: SmolLM2ForCausalLM, hidden: Tensor) -> list[int]:
    return model.lm_head(model.model.norm(hidden)).argmax(-1).tolist()
