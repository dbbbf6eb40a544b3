# %% [markdown]
# # 8. LoRA, DoRA and rsLoRA from their formulas
#
# Fine-tuning changes a weight W [O, I]. An adapter freezes W and learns a change of rank r instead,
# as a product of B [O, r] and A [r, I]:
#
# - LoRA ([arXiv 2106.09685](https://arxiv.org/abs/2106.09685)): `W + s B A`, with `s = alpha / r`.
# - rsLoRA ([arXiv 2312.03732](https://arxiv.org/abs/2312.03732)): the same with
#   `s = alpha / sqrt(r)`.
# - DoRA ([arXiv 2402.09353](https://arxiv.org/abs/2402.09353)): the rows of `W + s B A` give
#   directions only. Their lengths are learned apart, as a vector m [O] that starts as those of W.
#
# A starts random and B at zero, so training begins at W.

# %%
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from foundry_ext.adapters.fast import use_fast_linears

IN, OUT, ALPHA = 64, 48, 16
METHODS = {"LoRA": {}, "rsLoRA": {"use_rslora": True}, "DoRA": {"use_dora": True}}

# %% [markdown]
# ## Build
#
# DoRA's gradient treats the norm of a row as a constant (section 4.3 of the paper), hence `detach`.


# %%
def lora(x: Tensor, W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    return x @ W.T + scale * (x @ A.T) @ B.T  # A before B: no product of the size of W


def dora(x: Tensor, W: Tensor, A: Tensor, B: Tensor, scale: float, m: Tensor) -> Tensor:
    V = W + scale * B @ A
    return x @ (m[:, None] * V / V.norm(dim=1, keepdim=True).detach()).T


# %% [markdown]
# ## Compare
#
# peft wraps a linear layer. `use_fast_linears` gives peft's layer this package's forward and
# backward pass, which have fewer steps: DoRA's norms, for example, do not need B A. All weights,
# names and files stay peft's. Outputs and gradients are held against the formulas in fp64.


# %%
class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(IN, OUT, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def adapted(rank: int = 8, *, random_B: bool = True, **settings: bool) -> Any:
    """Return peft's adapted linear of a new model; its B is random, as after some training."""
    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=["linear"], **settings)
    model = get_peft_model(Model(), config)
    layer = model.base_model.model.linear
    if random_B:
        nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    return layer


def outputs(layer: Any, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Return y and the gradients of all trained tensors, for the gradient dy of y."""
    y = layer(x)
    trained = [p for p in layer.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad(y, trained, dy)]


def by_formula(layer: Any, x: Tensor, dy: Tensor, name: str) -> list[Tensor]:
    leaves = [p.detach().double().requires_grad_() for p in layer.parameters() if p.requires_grad]
    A, B, *m = leaves
    scale = ALPHA / (len(A) ** 0.5 if name == "rsLoRA" else len(A))
    formula = dora if name == "DoRA" else lora
    y = formula(x.double(), layer.base_layer.weight.double(), A, B, scale, *m)
    return [y, *torch.autograd.grad(y, leaves, dy.double())]


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True))


torch.manual_seed(1)
x, dy = torch.randn(32, IN), torch.randn(32, OUT)
errors: dict[str, list[float]] = {"peft": [], "foundry_ext": []}
for name, settings in METHODS.items():
    layer = adapted(**settings)
    exact = by_formula(layer, x, dy, name)
    errors["peft"].append(error(outputs(layer, x, dy), exact))
    holder = nn.ModuleList([layer])
    use_fast_linears(holder)
    assert type(layer).__module__.startswith("foundry_ext")
    errors["foundry_ext"].append(error(outputs(layer, x, dy), exact))
assert max(max(values) for values in errors.values()) < 1e-5

# %% [markdown]
# ## Plot
#
# Left: the worst error of the output and the gradients, which is fp32's rounding.
#
# Right: how far one step of gradient descent on one token moves that token's output, by rank, for
# the same alpha and learning rate. B is zero, so the step makes it proportional to s, and the
# output moves by s B A x. With |A x|^2, which grows with r, the change goes with s^2 r: LoRA's
# falls as 1 / r, and rsLoRA's stays. So LoRA of a high rank seems to learn no more, unless its
# learning rate or alpha grows with the rank.


# %%
def moved_by_a_step(rank: int, **settings: bool) -> float:
    """Return the mean over tokens."""
    layer, moved = adapted(rank, random_B=False, **settings), []
    B = layer.lora_B["default"].weight
    for token, gradient_of_y in zip(x, dy, strict=True):
        before = layer(token)
        (gradient,) = torch.autograd.grad(before, B, gradient_of_y)
        with torch.no_grad():
            B -= 1e-3 * gradient
            moved.append((layer(token) - before).norm().item())
            B.zero_()
    return sum(moved) / len(moved)


figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
for index, (name, values) in enumerate(errors.items()):
    left.scatter([place + 0.1 * index for place in range(len(METHODS))], values, label=name)
left.set_xticks([0.05, 1.05, 2.05], list(METHODS))
left.set(title="Error of output and gradients", yscale="log", ylim=(1e-8, 1e-5))
left.set(xlabel="method", ylabel="relative error")
left.legend(fontsize=8)
ranks = [2**power for power in range(8)]
moves = {name: [moved_by_a_step(r, **METHODS[name]) for r in ranks] for name in ("LoRA", "rsLoRA")}
for name, values in moves.items():
    right.loglog(ranks, values, marker="o", label=name)
right.set(title="One step of gradient descent", xlabel="rank", ylabel="change of the output")
right.legend(fontsize=8)
for name, expected in (("LoRA", 1 / ranks[-1]), ("rsLoRA", 1.0)):
    assert 0.5 < moves[name][-1] / moves[name][0] / expected < 2
folder = Path("outputs/from-scratch")
folder.mkdir(parents=True, exist_ok=True)
figure.savefig(folder / "08_adapters.png", dpi=120)

# %% [markdown]
# ## Exercise
#
# After training, an adapter can be merged: one matrix gives the same outputs. Write
# `merged(W, A, B, scale, m)`, where m is None for LoRA and rsLoRA.


# %%
def check(merged) -> None:
    for name, settings in METHODS.items():
        layer = adapted(**settings)
        A, B, *m = (p.detach() for p in layer.parameters() if p.requires_grad)
        scale, W = layer.scaling["default"], layer.base_layer.weight.detach().clone()
        with torch.no_grad():
            found, expected = x @ merged(W, A, B, scale, *(m or [None])).T, layer(x)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=name)
            layer.merge()  # peft's
            torch.testing.assert_close(x @ layer.base_layer.weight.T, found, rtol=1e-4, atol=1e-5)


# %% [markdown]
# ### Solution


# %% tags=["hide-cell"] jupyter={"source_hidden": true}
def merged(W: Tensor, A: Tensor, B: Tensor, scale: float, m: Tensor | None) -> Tensor:
    V = W + scale * B @ A
    return V if m is None else m[:, None] * V / V.norm(dim=1, keepdim=True)


check(merged)
