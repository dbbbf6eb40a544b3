# %% [markdown]
# # 3. Grouped-query attention
#
# A model keeps the keys and values of all earlier tokens while it generates. Grouped-query
# attention ([arXiv 2305.13245](https://arxiv.org/abs/2305.13245)) makes them smaller: H query heads
# share K key/value heads, and the `G = H / K` query heads of a group read the same one. K = H is
# ordinary multi-head attention, K = 1 multi-query attention. SmolLM2-135M has 9 query heads and 3
# key/value heads, 360M has 15 and 5, and 1.7B has 32 of each.

# %%
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import eager_attention_forward

from foundry_ext.models.attention import varlen_attention

LAYOUTS = {"135M": (9, 3), "360M": (15, 5), "1.7B": (32, 32)}  # (H, K)
N = 64  # head dimension

# %% [markdown]
# ## Build
#
# No key or value has to be repeated. It is enough to give the queries one more dimension: query
# head `h` is number `h % G` in the group of key/value head `h // G`.


# %%
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute causal attention: q [T, H, N], k and v [T, K, N] -> [T, H, N]."""
    grouped = q.unflatten(1, (k.shape[1], -1))  # [T, K, G, N]
    scores = torch.einsum("qkgn,tkn->kgqt", grouped, k) * N**-0.5
    later = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later, -torch.inf).softmax(-1)
    return torch.einsum("kgqt,tkn->qkgn", weights, v).flatten(1, 2)


# %% [markdown]
# ## Compare
#
# Hugging Face repeats keys and values (`repeat_kv`) and then runs ordinary attention. This
# package's `blockwise` backend groups the queries, as above. The results agree to rounding.


# %%
def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    module = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], training=False)
    mask = torch.full((len(q), len(q)), -torch.inf).triu(1)[None, None]
    by_head = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, heads, T, N]
    return eager_attention_forward(module, *by_head, mask, scaling=N**-0.5)[0][0]


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    cu_seqlens = torch.tensor([0, len(q)], dtype=torch.int32)  # one document
    return varlen_attention(q, k, v, cu_seqlens, len(q), backend="blockwise")


def wrong(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Let query head h read key/value head h % K, which no shape reveals."""
    mixed = q.unflatten(1, (-1, k.shape[1])).transpose(1, 2).flatten(1, 2)
    return attention(mixed, k, v).unflatten(1, (k.shape[1], -1)).transpose(1, 2).flatten(1, 2)


torch.manual_seed(0)
T = 96
versions = {"above": attention, "Hugging Face": theirs, "foundry_ext": ours, "h % K": wrong}
errors: dict[str, list[float]] = {name: [] for name in versions}
for H, K in LAYOUTS.values():
    q, k, v = (torch.randn(T, heads, N) for heads in (H, K, K))
    torch.testing.assert_close(attention(q, k, v), theirs(q, k, v), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(attention(q, k, v), ours(q, k, v), rtol=1e-5, atol=1e-5)
    exact = attention(q.double(), k.double(), v.double())
    for name, attend in versions.items():
        errors[name].append((attend(q, k, v) - exact).abs().max().item())

# %% [markdown]
# ## Plot
#
# Left: the largest difference from fp64. It is fp32's rounding, except in the wrong order of heads.
# (With K = H there is only one order.)
#
# Right: what the cache holds per token and layer, in bf16. Grouping makes it G times smaller.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
for index, (name, values) in enumerate(errors.items()):
    left.scatter([place + 0.1 * index for place in range(3)], values, label=name)
left.set(title="Error", yscale="log", ylim=(1e-8, 1e3), ylabel="largest difference from fp64")
left.set_xticks([0.15, 1.15, 2.15], list(LAYOUTS))
left.legend(fontsize=8, loc="upper right", ncols=2)
for index, name in enumerate(("multi-head", "grouped")):
    kilobytes = [2 * 2 * N * heads[index] / 1024 for heads in LAYOUTS.values()]
    right.bar([x + 0.35 * index for x in range(3)], kilobytes, width=0.34, label=name)
right.set_xticks([0.175, 1.175, 2.175], list(LAYOUTS))
right.set(title="Size of the cache", ylabel="cache per token and layer, KiB")
for axes in (left, right):
    axes.set_xlabel("size of SmolLM2")
right.legend(fontsize=8)
folder = Path("outputs/from-scratch")
folder.mkdir(parents=True, exist_ok=True)
figure.savefig(folder / "03_grouped_query_attention.png", dpi=120)

# %% [markdown]
# ## Exercise
#
# The paper turns a multi-head model into a grouped one by averaging the key and value heads of each
# group, and trains it a little further. Write `pool_heads(weight, H, K)`, which makes the weight
# [K * N, D] of a grouped projection from the weight [H * N, D] of `k_proj` or `v_proj`.


# %%
def check(pool_heads) -> None:
    H, K, D = 6, 2, 10
    weight = torch.randn(H * N, D)
    pooled = pool_heads(weight, H, K)
    assert pooled.shape == (K * N, D)
    torch.testing.assert_close(pooled[N : N + 1], weight[3 * N :: N].mean(0, keepdim=True))

    # If the heads of every group are equal already, pooling changes no output.
    x, q_proj = torch.randn(T, D), torch.randn(H * N, D)
    k_proj, v_proj = (
        torch.randn(K, 1, N, D).expand(K, H // K, N, D).reshape(H * N, D) for _ in range(2)
    )
    q, k, v = ((x @ w.T).unflatten(1, (-1, N)) for w in (q_proj, k_proj, v_proj))
    few_k, few_v = ((x @ pool_heads(w, H, K).T).unflatten(1, (-1, N)) for w in (k_proj, v_proj))
    pooled, whole = attention(q, few_k, few_v), attention(q, k, v)
    torch.testing.assert_close(pooled, whole, rtol=1e-4, atol=1e-4)


# %% [markdown]
# ### Solution


# %% tags=["hide-cell"] jupyter={"source_hidden": true}
def pool_heads(weight: Tensor, H: int, K: int) -> Tensor:
    return weight.view(K, H // K, N, -1).mean(1).flatten(0, 1)


check(pool_heads)
