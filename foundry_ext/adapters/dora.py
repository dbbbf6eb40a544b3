"""DoRA's forward pass (arXiv 2402.09353) at nearly LoRA's cost, for peft's linears.

T tokens, I inputs, O outputs, R ranks; W [O, I] frozen, A [R, I], B [O, R], m [O], scale s.

    y = g * (W x + s B A x),  g = m / n,  n = row norms of W + s B A, a constant in the gradient

peft 0.16 gets B A by multiplying A and B with an I x I identity, adds it to W for the norm, and
makes five passes over [T, O]. The expansion used here needs no [O, I] product:

    n_i^2 = |W_i|^2 + 2 s <B_i, (W A^T)_i> + s^2 B_i (A A^T) B_i^T

g is folded into the weights, over which autocast makes a pass anyway:

    y = x (g W)^T + (x A^T) (s g B)^T,  dm_i = sum_t dy_ti y_ti / m_i

Nothing is cached between calls. |W_i|^2 could be, but it is 0.3 % of the pass, and a merge would
make it stale. Only the forward pass is replaced: merging, saving and names stay peft's.
"""

from typing import Any

import torch
from peft.tuners.lora import layer as peft_layer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn


def use_fast_dora(model: nn.Module) -> None:
    """Give every linear with a DoRA adapter the forward pass of this module, in place.

    LoRA layers and adapted embeddings do not change. Call it again after adding an adapter.
    """
    for module in model.modules():
        if type(module) is peft_layer.Linear and any(
            type(variant) is DoraLinearVariant for variant in module.lora_variant.values()
        ):
            module.__class__ = FastDoraLinear


class FastDoraLinear(peft_layer.Linear):
    """peft's linear with a faster DoRA; cases that `_is_plain` excludes run peft's own forward."""

    # peft's hook for variants, `lora_variant`, runs after W x, too late to fold g into W.
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return [..., O] for x [..., I], in autocast's dtype if autocast is on."""
        if args or kwargs or not _is_plain(self, x):
            return super().forward(x, *args, **kwargs)
        (adapter,) = self.active_adapters
        weight = self.base_layer.weight
        lora_A, lora_B = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        magnitude = self.lora_magnitude_vector[adapter].weight
        scale = self.scaling[adapter]
        norm = row_norms(weight, lora_A, lora_B, scale)  # pyright: ignore[reportArgumentType]
        return _DoraProduct.apply(
            x.to(_compute_dtype(x)), weight, lora_A, lora_B, magnitude, norm, scale
        )  # pyright: ignore[reportReturnType]


@torch.no_grad()
def row_norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """Return |W_i + s B_i A| of every row, at least in fp32: [O, I], [R, I], [O, R] -> [O].

    The error relative to |W_i|^2 / n_i^2 is fp32's rounding, or TF32's in the second term if TF32
    is allowed. It is large only if the adapter nearly cancels a row.
    """
    with torch.autocast(weight.device.type, enabled=False):
        wide = torch.promote_types(weight.dtype, torch.float32)
        weight, lora_A, lora_B = (x.to(wide) for x in (weight, lora_A, lora_B))
        base = torch.linalg.vector_norm(weight, dim=1).square()
        cross = (lora_B * (weight @ lora_A.T)).sum(1)
        change = (lora_B * (lora_B @ (lora_A @ lora_A.T))).sum(1)
        return (base + 2 * scale * cross + scale**2 * change).clamp(min=0).sqrt()


class _DoraProduct(torch.autograd.Function):
    """The formula for y in the module's docstring, without a gradient of W.

    The backward pass scales W again, because saving g W would keep a copy of W in every layer.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        magnitude: Tensor,
        norm: Tensor,
        scale: float,
    ) -> Tensor:
        x_TI = x.reshape(-1, x.shape[-1])
        gain = (magnitude / norm)[:, None]
        h_TR = x_TI @ lora_A.to(x.dtype).T
        y_TO = x_TI @ (gain * weight).to(x.dtype).T
        y_TO = torch.addmm(y_TO, h_TR, (scale * gain * lora_B).to(x.dtype).T)
        ctx.save_for_backward(x_TI, h_TR, y_TO, weight, lora_A, lora_B, magnitude, gain)
        ctx.scale, ctx.shape = scale, x.shape
        return y_TO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, h_TR, y_TO, weight, lora_A, lora_B, magnitude, gain = ctx.saved_tensors
        dtype, scale = x_TI.dtype, ctx.scale
        dy_TO = grads[0].reshape(y_TO.shape)
        dh_TR = dy_TO @ (scale * gain * lora_B).to(dtype)
        d_lora_A = (dh_TR.T @ x_TI).to(lora_A.dtype)
        d_lora_B = (scale * gain * (dy_TO.T @ h_TR)).to(lora_B.dtype)
        wide = torch.promote_types(dtype, torch.float32)
        # With a magnitude of exactly 0, y is 0 and does not determine the gradient; use 0.
        d_magnitude = (dy_TO * y_TO).sum(0, dtype=wide) / magnitude
        d_magnitude = d_magnitude.masked_fill(magnitude == 0, 0).to(magnitude.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.addmm(dh_TR @ lora_A.to(dtype), dy_TO, (gain * weight).to(dtype))
            dx = dx.view(ctx.shape)
        return dx, None, d_lora_A, d_lora_B, d_magnitude, None, None


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _is_plain(module: peft_layer.Linear, x: Tensor) -> bool:
    """Return whether the module is a frozen linear with one DoRA adapter, all of it on this rank.

    Excluded are adapters that are off, merged or mixed; dropout, which peft applies to W x too;
    sharded weights, which FSDP gathers in the forward pass of the module that holds them; and fp16,
    in which dy * y may underflow.
    """
    adapters = module.active_adapters
    if module.disable_adapters or module.merged or len(adapters) != 1:
        return False
    adapter = adapters[0]
    base: Any = module.base_layer
    if type(module.lora_variant.get(adapter)) is not DoraLinearVariant:
        return False
    parameters: Any = (
        base.weight,
        module.lora_A[adapter].weight,
        module.lora_B[adapter].weight,
        module.lora_magnitude_vector[adapter].weight,
    )
    weight, (out_features, in_features), rank = base.weight, base.weight.shape, module.r[adapter]
    shapes = [(out_features, in_features), (rank, in_features), (out_features, rank)]
    return (
        type(base) is nn.Linear
        and base.bias is None
        and not weight.requires_grad
        and not module.fan_in_fan_out
        and not module.lora_bias[adapter]
        and (isinstance(module.lora_dropout[adapter], nn.Identity) or not module.training)
        and all(type(p) in (nn.Parameter, Tensor) for p in parameters)
        and [tuple(p.shape) for p in parameters] == [*shapes, (out_features,)]
        and x.shape[-1] == in_features
        and _has_plain_types(x, parameters)
    )


def _has_plain_types(x: Tensor, parameters: tuple[Tensor, ...]) -> bool:
    dtype = _compute_dtype(x)
    if torch.is_autocast_enabled(x.device.type):
        return dtype == torch.bfloat16
    return dtype != torch.float16 and all(p.dtype == dtype for p in parameters)
