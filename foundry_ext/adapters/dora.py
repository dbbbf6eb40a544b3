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
from torch import Tensor

from foundry_ext.adapters.plain import compute_dtype, plain_adapter


class FastDoraLinear(peft_layer.Linear):
    """peft's linear with a faster DoRA; what `plain_adapter` excludes runs peft's own forward."""

    # peft's hook for variants, `lora_variant`, runs after W x, too late to fold g into W.
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return [..., O] for x [..., I], in autocast's dtype if autocast is on."""
        adapter = None if args or kwargs else plain_adapter(self, x)
        if adapter is None or type(self.lora_variant.get(adapter)) is not DoraLinearVariant:
            return super().forward(x, *args, **kwargs)
        weight = self.base_layer.weight
        lora_A, lora_B = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        magnitude = self.lora_magnitude_vector[adapter].weight
        scale = self.scaling[adapter]
        norm = row_norms(weight, lora_A, lora_B, scale)  # pyright: ignore[reportArgumentType]
        return _DoraProduct.apply(
            x.to(compute_dtype(x)), weight, lora_A, lora_B, magnitude, norm, scale
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
        product = 2 * scale * (weight @ lora_A.T) + scale**2 * (lora_B @ (lora_A @ lora_A.T))
        return (base + (lora_B * product).sum(1)).clamp(min=0).sqrt()


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
        A_RI, B_OR = lora_A.to(x.dtype), (scale * gain * lora_B).to(x.dtype)
        h_TR = x_TI @ A_RI.T
        y_TO = x_TI @ (gain * weight).to(x.dtype).T
        # In place, here and below, because addmm would copy its first argument.
        y_TO.addmm_(h_TR, B_OR.T)
        # The factors' casts are small; that of g W, as large as the model, is made again.
        ctx.save_for_backward(x_TI, h_TR, y_TO, A_RI, B_OR, weight, magnitude, gain)
        ctx.scale, ctx.shape, ctx.dtypes = scale, x.shape, (lora_A.dtype, lora_B.dtype)
        return y_TO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, h_TR, y_TO, A_RI, B_OR, weight, magnitude, gain = ctx.saved_tensors
        dtype, (dtype_A, dtype_B) = x_TI.dtype, ctx.dtypes
        dy_TO = grads[0].reshape(y_TO.shape)
        dh_TR = dy_TO @ B_OR
        d_lora_A = (dh_TR.T @ x_TI).to(dtype_A)
        d_lora_B = (ctx.scale * gain * (dy_TO.T @ h_TR)).to(dtype_B)
        wide = torch.promote_types(dtype, torch.float32)
        # With a magnitude of exactly 0, y is 0 and does not determine the gradient; use 0.
        d_magnitude = (dy_TO * y_TO).sum(0, dtype=wide) / magnitude
        d_magnitude = d_magnitude.masked_fill(magnitude == 0, 0).to(magnitude.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dh_TR @ A_RI).addmm_(dy_TO, (gain * weight).to(dtype))
            dx = dx.view(ctx.shape)
        return dx, None, d_lora_A, d_lora_B, d_magnitude, None, None
