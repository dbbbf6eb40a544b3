"""Scores of documents that share a prefix, which is computed once for all of them.

A *tree* is a prefix and its branches, the rest of each document. The prefix is laid out first, then
one branch after the other; positions in every branch continue after the prefix. A token sees the
earlier tokens of its own branch and of the prefix. evaluation/trees.py lays trees out.

Example: documents `5 6 7` and `5 6 8 9` are laid out as `5 6 7 8 9` with positions 0 1 2 2 3, and
bounds (0, 2, 3, 5). The token 8 sees 5, 6 and itself.

T laid-out tokens, L scored tokens, N documents, H query heads, K key/value heads, D hidden size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from foundry_ext.models.attention import resolve_backend, varlen_attention
from foundry_ext.models.checks import check_ids
from foundry_ext.models.decoder import Attend
from foundry_ext.models.flex import LEAST_HEAD, flex_attention
from foundry_ext.models.scores import score_positions
from foundry_ext.models.smollm2 import SmolLM2ForCausalLM

Bounds = tuple[int, ...]
"""Start of a tree, end of its prefix, and end of every branch; (start, end) without branches."""


class Segment(NamedTuple):
    """Tokens `start` to `end` of a pack, which also see the tokens `prefix`."""

    start: int
    end: int
    prefix: slice


@dataclass(frozen=True)
class TreePack:
    """Trees laid end to end."""

    input_ids: Tensor
    """[T] int64."""
    position_ids: Tensor
    """[T] int64."""
    trees: Sequence[Bounds]
    states: Tensor
    """[L] int64, the position whose state predicts the target; several may predict from one."""
    targets: Tensor
    """[L] int64, token ids."""
    documents: Tensor
    """[L] int64 on the CPU, the document that the target is in, 0 to N - 1."""
    num_documents: int

    def to(self, device: torch.device) -> "TreePack":
        """Return the pack with the tensors that the model reads on a device."""
        names = ("input_ids", "position_ids", "states", "targets")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    @cached_property
    def segments(self) -> list[Segment]:
        """Prefixes and branches in the order of the tokens, without empty ones."""
        return [segment for bounds in self.trees for segment in _segments(bounds)]

    @cached_property
    def keys(self) -> "Keys":
        """Keys of the segments, for kernels whose queries and keys may differ."""
        return _keys(self.segments, self.input_ids.device)

    @cached_property
    def masks(self) -> list[Tensor | None]:
        """Mask of each tree, [queries of its branches, its tokens] bool; None without a branch."""
        device = self.input_ids.device
        return [_branches_mask(bounds, device) for bounds in self.trees]

    @cached_property
    def block_mask(self) -> Any:
        """FlexAttention's mask of the whole pack."""
        from torch.nn.attention.flex_attention import create_block_mask

        tree, branch = (torch.zeros_like(self.input_ids) for _ in range(2))
        for index, bounds in enumerate(self.trees):
            tree[bounds[0] : bounds[-1]] = index
            for number, (start, end) in enumerate(pairwise(bounds[1:]), 1):
                branch[start:end] = number

        def sees(_batch, _head, query, key):
            same = (branch[key] == 0) | (branch[key] == branch[query])
            return (tree[query] == tree[key]) & same & (query >= key)

        return create_block_mask(sees, None, None, *2 * (len(tree),), device=str(tree.device))


class Keys(NamedTuple):
    """S segments, each a document of the kernels; its keys include the prefix's."""

    index: Tensor
    """[sum of keys] int64, the token of each key."""
    cu_queries: Tensor
    """[S+1] int32."""
    cu_keys: Tensor
    """[S+1] int32."""
    max_queries: int
    max_keys: int


def _segments(bounds: Bounds) -> Iterator[Segment]:
    start, prefix_end = bounds[:2]
    yield Segment(start, prefix_end, slice(start, start))
    for branch, end in pairwise(bounds[1:]):
        if end > branch:
            yield Segment(branch, end, slice(start, prefix_end))


def _keys(segments: Sequence[Segment], device: torch.device) -> Keys:
    index = [
        part
        for start, end, prefix in segments
        for part in (torch.arange(prefix.start, prefix.stop), torch.arange(start, end))
    ]
    queries = [end - start for start, end, _ in segments]
    keys = [one.end - one.start + one.prefix.stop - one.prefix.start for one in segments]

    def ends(lengths: list[int]) -> Tensor:
        return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device, torch.int32)

    return Keys(torch.cat(index).to(device), ends(queries), ends(keys), max(queries), max(keys))


def _branches_mask(bounds: Bounds, device: torch.device) -> Tensor | None:
    start, prefix_end, end = bounds[0], bounds[1], bounds[-1]
    if end == prefix_end:
        return None
    prefix = prefix_end - start
    mask = torch.zeros(end - prefix_end, end - start, dtype=torch.bool, device=device)
    mask[:, :prefix] = True
    for first, last in pairwise(bound - prefix_end for bound in bounds[1:]):
        rows = slice(first, last)
        mask[rows, prefix + first : prefix + last] = torch.ones_like(
            mask[rows, prefix + first : prefix + last]
        ).tril()
    return mask


def tree_attention(pack: TreePack, backend: str) -> Attend:
    """Return the attention of a pack's tokens; `backend` is one of attention.py's.

    The flash kernels take the keys of every segment, FlexAttention a mask. All other backends
    attend within one tree at a time, which runs on any device and in any dtype.
    """

    def attend(q_THN: Tensor, k_TKN: Tensor, v_TKN: Tensor) -> Tensor:
        chosen = resolve_backend(
            backend,
            device=q_THN.device.type,
            dtype=v_TKN.dtype,
            narrow_heads=q_THN.shape[-1] < LEAST_HEAD,
        )
        if chosen == "flex":
            return flex_attention(q_THN, k_TKN, v_TKN, pack.block_mask)
        if chosen in ("flash_attn", "torch_varlen"):
            keys = pack.keys
            return varlen_attention(
                *(q_THN, k_TKN[keys.index], v_TKN[keys.index]),
                *(keys.cu_queries, keys.max_queries),
                keys=(keys.cu_keys, keys.max_keys),
                backend=chosen,
            )
        return _by_tree(q_THN, k_TKN, v_TKN, pack)

    return attend


def _by_tree(q: Tensor, k: Tensor, v: Tensor, pack: TreePack) -> Tensor:
    # Repeated, because on a CPU sdpa's `enable_gqa` leaves the fused kernel.
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    attended = []
    for (start, prefix_end, *branches), mask in zip(pack.trees, pack.masks, strict=True):
        end = branches[-1] if branches else prefix_end
        q_i, k_i, v_i = (x[:, :, start:prefix_end] for x in (q, k, v))
        attended.append(F.scaled_dot_product_attention(q_i, k_i, v_i, is_causal=True))
        if mask is not None:
            q_i, k_i, v_i = q[:, :, prefix_end:end], k[:, :, start:end], v[:, :, start:end]
            attended.append(F.scaled_dot_product_attention(q_i, k_i, v_i, attn_mask=mask))
    return torch.cat(attended, dim=2)[0].transpose(0, 1)


@torch.no_grad()
def score_trees(model: SmolLM2ForCausalLM, pack: TreePack) -> Tensor:
    """Return [N] float64 on the CPU, each document's summed log-probability of its targets, nats.

    The model is in evaluation mode, and the pack on its device.
    """
    check_ids(pack.input_ids, pack.targets, model.config.vocab_size)
    attend = tree_attention(pack, model.attention_backend)
    embedded = model.model.embed_tokens(pack.input_ids)
    hidden = model.model(embedded, pack.position_ids, lambda _layer: attend)
    states = model.model.norm(hidden[pack.states])
    log_prob = score_positions(states, model.head_weight, pack.targets).log_prob
    # Summed on the CPU, in the same order for every device, and in float64 for any length.
    sums = torch.zeros(pack.num_documents, dtype=torch.float64)
    return sums.index_add_(0, pack.documents, log_prob.cpu().double())
