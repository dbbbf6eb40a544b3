# %% [markdown]
# # 2. Rotary positions
#
# Attention sees a set of tokens, not a sequence. Rotary embedding
# ([arXiv 2104.09864](https://arxiv.org/abs/2104.09864)) gives it the order: it cuts each head of a
# query or key into pairs of numbers and turns pair `i` of the token at position `p` by the angle
#
#     p * theta ** (-2 * i / N)
#
# where N is the head dimension. The dot product of a turned query and a turned key then depends on
# the distance between their positions only.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from transformers.models.llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from foundry_ext.models.rope import apply_rotary, rotary_cos_sin

N, THETA = 64, 100_000.0  # head dimension and base of SmolLM2-135M

# %% [markdown]
# ## Build
#
# A pair of numbers is a complex number, and turning it is a multiplication. Llama pairs dimension
# `i` with `i + N/2`, not with its neighbour.


# %%
def turn(x: Tensor, positions: Tensor) -> Tensor:
    """Turn x [T, H, N] by its positions [T], in fp64."""
    frequency = THETA ** (-torch.arange(0, N, 2, dtype=torch.float64) / N)
    angle = positions[:, None, None] * frequency  # [T, 1, N/2]
    real, imaginary = x.double().chunk(2, dim=-1)
    turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), dim=-1)


# %% [markdown]
# ## Compare
#
# Hugging Face and this package compute angles in fp32. At small positions that is as good as fp64.
# Their results are equal to each other, bit for bit. Hugging Face keeps every angle twice, once for
# each half of the head, and this package once.

# %%
torch.manual_seed(0)
T, H = 16, 3
q, k = torch.randn(2, T, H, N)
positions = torch.arange(T)

cos, sin = rotary_cos_sin(positions, head_dim=N, theta=THETA, dtype=q.dtype)
our_q, our_k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)

config = LlamaConfig(hidden_size=H * N, num_attention_heads=H, rope_theta=THETA)
their_cos_sin = LlamaRotaryEmbedding(config)(q, positions[None])
by_head = (x.transpose(0, 1)[None] for x in (q, k))  # [1, H, T, N]
their_q, their_k = (x[0].transpose(0, 1) for x in apply_rotary_pos_emb(*by_head, *their_cos_sin))

assert torch.equal(our_q, their_q) and torch.equal(our_k, their_k)
torch.testing.assert_close(our_q.double(), turn(q, positions), rtol=1e-5, atol=1e-5)

# Moving all tokens by the same distance changes no score.
scores = torch.einsum("qhn,khn->hqk", turn(q, positions), turn(k, positions))
moved = torch.einsum("qhn,khn->hqk", turn(q, positions + 999), turn(k, positions + 999))
torch.testing.assert_close(scores, moved)

# %% [markdown]
# ## Plot
#
# How wrong is an angle at each position? The first pair's is the position itself, in radians, so an
# error of 1 means that the position is lost.
#
# - fp32 angles are off by less than a thousandth at all 8192 positions.
# - bf16 has 8 significant bits. Positions in bf16 are wrong from 257 on, at the end by up to 16.
# - `model.bfloat16()` rounds the frequencies that Hugging Face keeps in a buffer. bf16 holds the
#   first, which is 1, but none of the others. Loading with `from_pretrained(..., torch_dtype=...)`
#   does not round them. This package keeps no frequencies in the model.


# %%
def wrong_by(pair: int, dtype: torch.dtype, *, round_positions: bool) -> Tensor:
    """Return the largest error of a pair's angle, in radians, up to every position."""
    place = torch.arange(8192)
    exact = place.double() * THETA ** (-2 * pair / N)
    frequency = (1.0 / THETA ** torch.tensor(2 * pair / N)).to(dtype).float()
    rounded = place.to(dtype).float() if round_positions else place.float()
    return (rounded * frequency - exact).abs().cummax(0).values


errors = {
    "positions in bf16, first pair": wrong_by(0, torch.bfloat16, round_positions=True),
    "frequencies in bf16, second pair": wrong_by(1, torch.bfloat16, round_positions=False),
    "all in fp32, second pair": wrong_by(1, torch.float32, round_positions=True),
}
in_bf16, _, in_fp32 = errors.values()
assert in_fp32[-1] < 1e-3
assert in_bf16[256] == 0 and in_bf16[257] == 1 and in_bf16[-1] == 16

figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
for name, error in errors.items():
    axes.loglog(error, label=name)
axes.axhline(1, color="grey", linestyle="--")
axes.set(title="Error of the rotation by position", ylim=(1e-8, 100))
axes.set(xlabel="position, tokens", ylabel="error of the angle, radians")
axes.legend(fontsize=8, loc="upper left")
folder = Path("outputs/from-scratch")
folder.mkdir(parents=True, exist_ok=True)
figure.savefig(folder / "02_rotary.png", dpi=120)

# %% [markdown]
# ## Exercise
#
# The original paper pairs neighbours, `2i` with `2i + 1`. Checkpoints for the two conventions
# differ in the order of the rows of `q_proj` and `k_proj`. Write `to_neighbours(weight)`, which
# reorders the rows of a projection [H * N, D] from Llama's convention to the paper's, so that
# all scores stay the same.


# %%
def turn_neighbours(x: Tensor, positions: Tensor) -> Tensor:
    """Turn x [T, H, N] as the paper does, by Llama's pairs of a reordered x."""
    turned = turn(torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1), positions)
    return torch.stack(turned.chunk(2, dim=-1), dim=-1).flatten(-2)


def check(to_neighbours) -> None:
    x, q_proj, k_proj = torch.randn(T, 8), torch.randn(H * N, 8), torch.randn(H * N, 8)
    expected, found = (
        torch.einsum(
            "qhn,khn->hqk",
            *(rope((x @ w.T).view(T, H, N), positions) for w in (order(q_proj), order(k_proj))),
        )
        for rope, order in ((turn, lambda w: w), (turn_neighbours, to_neighbours))
    )
    torch.testing.assert_close(found, expected)


# %% [markdown]
# ### Solution


# %% tags=["hide-cell"] jupyter={"source_hidden": true}
def to_neighbours(weight: Tensor) -> Tensor:
    halves = weight.view(
        H, 2, N // 2, -1
    )  # dimension i of the first half goes with i of the second
    return halves.transpose(1, 2).reshape(weight.shape)


check(to_neighbours)
