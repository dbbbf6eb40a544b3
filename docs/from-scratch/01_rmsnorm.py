# %% [markdown]
# # 1. RMSNorm and its dtypes
#
# RMSNorm divides a token's vector by its root mean square and scales each dimension by a learned
# weight ([arXiv 1910.07467](https://arxiv.org/abs/1910.07467)):
#
#     y[i] = w[i] * x[i] / sqrt(mean(x²) + eps)
#
# The formula leaves open in which dtype each step is computed. With fp32 inputs that hardly
# matters. With bf16 and fp16 it decides the error, and whether the result is a number at all.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.func import functional_call
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from foundry_ext.models.decoder import RMSNorm

EPS = 1e-5

# %% [markdown]
# ## Build
#
# Three versions of the same line. They differ only in where they round to the dtype of `x`.


# %%
def plain(x: Tensor, weight: Tensor) -> Tensor:
    """Round after every operation."""
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight


def normalise_wide(x: Tensor, weight: Tensor) -> Tensor:
    """Normalise in fp32, round, scale, round again."""
    wide = x.float()
    return (wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()).to(x.dtype) * weight


def all_wide(x: Tensor, weight: Tensor) -> Tensor:
    """Normalise and scale in fp32, and round once."""
    return plain(x.float(), weight.float()).to(x.dtype)


# %% [markdown]
# ## Compare
#
# Hugging Face's norm is the second version, bit for bit. This package's norm, which is torch's own
# `F.rms_norm`, rounds once, like the third. In fp32 all of them agree to a few roundings.

# %%
torch.manual_seed(0)
D = 576  # the hidden size of SmolLM2-135M
x, weight = torch.randn(64, D), torch.empty(D).uniform_(0.5, 1.5)


def theirs(x: Tensor, weight: Tensor) -> Tensor:
    return functional_call(LlamaRMSNorm(D, EPS), {"weight": weight}, x)


def ours(x: Tensor, weight: Tensor) -> Tensor:
    return functional_call(RMSNorm(D, EPS), {"weight": weight}, x)


for norm in (plain, normalise_wide, all_wide):
    torch.testing.assert_close(norm(x, weight), theirs(x, weight), rtol=1e-6, atol=0)
    torch.testing.assert_close(norm(x, weight), ours(x, weight), rtol=1e-6, atol=0)

for dtype in (torch.bfloat16, torch.float16):
    inputs = x.to(dtype), weight.to(dtype)
    assert torch.equal(normalise_wide(*inputs), theirs(*inputs))
    torch.testing.assert_close(
        all_wide(*inputs), ours(*inputs), rtol=torch.finfo(dtype).eps, atol=0
    )

# %% [markdown]
# ## Plot
#
# The error against fp64, over inputs of very different size. A dashed line marks half a unit in
# the last place, `eps / 2`, the most that one rounding is off.
#
# - Rounding once is better than rounding twice, and twice is better than after every step.
# - In fp16 the plain version fails for large inputs: squares of numbers above 256 overflow, the
#   root is infinite, and the output is zero. It loses digits for small inputs, whose squares fp16
#   can hardly represent. bf16 has the range of fp32, so there the plain version is only inaccurate.


# %%
@torch.no_grad()
def error(y: Tensor, exact: Tensor) -> float:
    return ((y.double() - exact).norm() / exact.norm()).item()


scales = [10**power for power in torch.linspace(-3, 4, 15).tolist()]
figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
for axes, dtype in zip(panels, (torch.bfloat16, torch.float16), strict=True):
    inputs = [((x * scale).to(dtype), weight.to(dtype)) for scale in scales]
    exact = [plain(*(t.double() for t in pair)) for pair in inputs]
    for name, norm in {
        "round after every step": plain,
        "Hugging Face": theirs,
        "foundry_ext": ours,
    }.items():
        errors = [error(norm(*pair), y) for pair, y in zip(inputs, exact, strict=True)]
        axes.loglog(scales, errors, marker=".", label=name)
    axes.axhline(torch.finfo(dtype).eps / 2, color="grey", linestyle="--", label="eps / 2")
    axes.set(title=f"RMSNorm in {dtype}", xlabel="size of the input")
panels[0].set_ylabel("relative error")
panels[0].legend(fontsize=8)
folder = Path("outputs/from-scratch")
folder.mkdir(parents=True, exist_ok=True)
figure.savefig(folder / "01_rmsnorm.png", dpi=120)

# %% [markdown]
# ## Exercise
#
# Write the backward pass by hand: `gradient(x, weight, dy)` returns the gradients of `x` [T, D]
# and of `weight` [D] for a gradient `dy` [T, D] of the output. The root mean square depends on
# every element of the token, so each `dx` has two terms.


# %%
def check(gradient) -> None:
    x, dy = torch.randn(2, 5, 8, dtype=torch.float64)
    weight = torch.rand(8, dtype=torch.float64) + 0.5
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    expected = torch.autograd.grad(plain(*leaves), leaves, dy)
    for found, right in zip(gradient(x, weight, dy), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-10)


# %% [markdown]
# ### Solution


# %% tags=["hide-cell"] jupyter={"source_hidden": true}
def gradient(x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    r = (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
    normalised, scaled = x * r, weight * dy
    dx = r * (scaled - normalised * (scaled * normalised).mean(-1, keepdim=True))
    return dx, (dy * normalised).sum(0)


check(gradient)
