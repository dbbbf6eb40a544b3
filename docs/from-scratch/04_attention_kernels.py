# %% [markdown]
# # 4. Why attention kernels differ, and by how much
#
# Hand-written attention, torch's `scaled_dot_product_attention` (SDPA) and FlashAttention compute
# the same formula, and none of them gives the same bits. Three things differ:
#
# 1. **Where scores are rounded.** Hand-written code writes q @ k to memory, in bf16 if q is bf16. A
#    fused kernel keeps the scores in fp32 registers.
# 2. **What is rounded for the second product.** Hand-written code rounds weights that sum to 1. A
#    flash kernel does not know the sum yet; it rounds `exp(score - largest so far)` and divides
#    at the end.
# 3. **The order of the sums**, which depends on tile sizes, and so on the length and the machine.
#
# So the question is not whether two kernels differ, but how far each is from the exact result.

# %%
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import eager_attention_forward

from foundry_ext.models.attention import varlen_attention

N = 64  # head dimension

# %% [markdown]
# ## Build
#
# First the formula, then the idea of FlashAttention
# ([arXiv 2205.14135](https://arxiv.org/abs/2205.14135)): go through the keys tile by tile, keep the
# largest score and the sum of the weights so far, and shrink what has been added up whenever a
# larger score appears. No T x T matrix exists.


# %%
def hand_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute causal attention: q, k, v [H, T, N] -> [H, T, N]."""
    scores = q @ k.transpose(1, 2) * N**-0.5
    later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    at_least_fp32 = torch.promote_types(q.dtype, torch.float32)
    weights = scores.masked_fill(later, -torch.inf).softmax(-1, dtype=at_least_fp32)
    return weights.to(q.dtype) @ v


def flash(q: Tensor, k: Tensor, v: Tensor, tile: int = 64) -> Tensor:
    positions = torch.arange(q.shape[1])
    out = torch.zeros(q.shape)
    total, top = torch.zeros(*q.shape[:2], 1), torch.full((*q.shape[:2], 1), -torch.inf)
    for keys in positions.split(tile):
        scores = q.float() @ k[:, keys].float().transpose(1, 2) * N**-0.5  # never rounded to bf16
        scores = scores.masked_fill(keys > positions[:, None], -torch.inf)
        new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
        weights, shrink = (scores - new_top).exp(), (top - new_top).exp()
        total = total * shrink + weights.sum(-1, keepdim=True)
        out = out * shrink + weights.to(v.dtype).float() @ v[:, keys].float()
        top = new_top
    return (out / total).to(q.dtype)


# %% [markdown]
# ## Compare
#
# Hugging Face has a hand-written version ("eager") and SDPA. This package has several backends. On
# a CPU, `blockwise` is hand-written, a block of queries at a time, and `torch_cpu` is the flash
# kernel behind SDPA, without repeating keys for grouped heads.


# %%
def hugging_face(forward, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    module = SimpleNamespace(num_key_value_groups=1, training=False)
    mask = torch.full((q.shape[1],) * 2, -torch.inf, dtype=q.dtype).triu(1)[None, None]
    mask = None if forward is sdpa_attention_forward else mask  # SDPA then takes is_causal
    out = forward(module, q[None], k[None], v[None], mask, scaling=N**-0.5)[0]
    return out[0].transpose(0, 1)


def foundry_ext(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    by_token = (x.transpose(0, 1) for x in (q, k, v))
    ends = torch.tensor([0, q.shape[1]], dtype=torch.int32)
    return varlen_attention(*by_token, ends, q.shape[1], backend=backend).transpose(0, 1)


KERNELS = {
    "hand-written": hand_written,
    "flash, above": flash,
    "Hugging Face eager": lambda *qkv: hugging_face(eager_attention_forward, *qkv),
    "Hugging Face SDPA": lambda *qkv: hugging_face(sdpa_attention_forward, *qkv),
    "foundry_ext blockwise": lambda *qkv: foundry_ext("blockwise", *qkv),
    "foundry_ext torch_cpu": lambda *qkv: foundry_ext("torch_cpu", *qkv),
}
LENGTHS = [32, 64, 128, 256, 512, 1024]
errors = {dtype: {name: [] for name in KERNELS} for dtype in (torch.float32, torch.bfloat16)}
torch.manual_seed(0)
for length in LENGTHS:
    for dtype, by_kernel in errors.items():
        qkv = [x.to(dtype) for x in torch.randn(3, 2, length, N)]
        exact = hand_written(*(x.double() for x in qkv))
        for name, kernel in KERNELS.items():
            by_kernel[name].append(((kernel(*qkv) - exact).norm() / exact.norm()).item())

for dtype, by_kernel in errors.items():
    worst = {name: 2 * max(found) / torch.finfo(dtype).eps for name, found in by_kernel.items()}
    print(dtype, *(f"{name} {value:.2f}" for name, value in worst.items()), sep=", ")
    assert max(worst.values()) < (10 if dtype == torch.float32 else 2)

# %% [markdown]
# ## Plot
#
# In bf16 there are two families, at least on a Xeon with AMX. Kernels that round the scores are off
# by about one rounding of the dtype, those that keep them in fp32 by half of one, at every length.
# In fp32 only the order of the sums is left, and the error grows slowly with the length.

# %%
figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
for axes, (dtype, by_kernel) in zip(panels, errors.items(), strict=True):
    for index, (name, values) in enumerate(by_kernel.items()):
        style = {"linestyle": ("-", "--")[index % 2], "marker": "os^vDP"[index], "alpha": 0.7}
        axes.plot(LENGTHS, values, markersize=5, label=name, **style)
    axes.axhline(torch.finfo(dtype).eps / 2, color="grey", linestyle=":", label="eps / 2")
    axes.set(xscale="log", ylim=(0, None))
    axes.set(title=f"Attention in {dtype}", xlabel="length, tokens")
panels[0].set_ylabel("relative error")
panels[0].legend(fontsize=7)
folder = Path("outputs/from-scratch")
folder.mkdir(parents=True, exist_ok=True)
figure.savefig(folder / "04_attention_kernels.png", dpi=120)

# %% [markdown]
# ## Exercise
#
# Several devices can each attend to a part of the keys, if the parts can be merged. A flash kernel
# also returns the logarithm of the sum of `exp(score)`, here `log_sum` [H, T, 1]. Write
# `merge(out_a, log_sum_a, out_b, log_sum_b)`, which returns the attention over both parts. Scores
# may be large: the exponential of a log_sum overflows.


# %%
def part(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return attention over all of these keys, and log_sum."""
    scores = q @ k.transpose(1, 2) * N**-0.5
    return scores.softmax(-1) @ v, scores.logsumexp(-1, keepdim=True)


def check(merge) -> None:
    for size in (1, 100):  # scores up to some hundred thousand
        q, k, v = size * torch.randn(3, 2, 50, N, dtype=torch.float64)
        expected, _ = part(q, k, v)
        merged = merge(*part(q, k[:, :20], v[:, :20]), *part(q, k[:, 20:], v[:, 20:]))
        torch.testing.assert_close(merged, expected)


# %% [markdown]
# ### Solution


# %% tags=["hide-cell"] jupyter={"source_hidden": true}
def merge(out_a: Tensor, log_sum_a: Tensor, out_b: Tensor, log_sum_b: Tensor) -> Tensor:
    share = torch.sigmoid(log_sum_a - log_sum_b)  # exp(a) / (exp(a) + exp(b)), without overflow
    return share * out_a + (1 - share) * out_b


check(merge)
