"""LoRA's forward pass (arXiv 2106.09685) with fewer passes over its output than peft's.

T tokens, I inputs, O outputs, R ranks; W [O, I] frozen, A [R, I], B [O, R], scale s.

    y = x W^T + s (x A^T) B^T

peft 0.16 scales the adapter's [T, O], adds it to W x, and casts it, each in a pass of its own. Here
the matrix product adds it, scaled, in fp32. Autocast would keep a bf16 copy of each frozen fp32 W
for the backward pass; here W is cast again. Only the forward pass is replaced: merging, saving and
names stay peft's. rsLoRA (another s) and PiSSA (another start) run through it too.
"""

from typing import Any

import torch
from peft.tuners.lora import layer as peft_layer
from torch import Tensor

from foundry_ext.adapters.plain import compute_dtype, plain_adapter


class FastLoraLinear(peft_layer.Linear):
    """peft's linear with a faster LoRA; what `plain_adapter` excludes runs peft's own forward."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return [..., O] for x [..., I], in autocast's dtype if autocast is on."""
        adapter = None if args or kwargs else plain_adapter(self, x)
        if adapter is None or adapter in self.lora_variant:
            return super().forward(x, *args, **kwargs)
        factors = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        x = x.to(compute_dtype(x))
        return _LoraProduct.apply(x, self.base_layer.weight, *factors, self.scaling[adapter])  # pyright: ignore[reportReturnType]


class _LoraProduct(torch.autograd.Function):
    """The formula in the module's docstring, without a gradient of W."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float
    ) -> Tensor:
        x_TI = x.reshape(-1, x.shape[-1])
        A_RI, B_OR = lora_A.to(x.dtype), lora_B.to(x.dtype)
        h_TR = x_TI @ A_RI.T
        # In place, here and below, because addmm would copy its first argument.
        y_TO = (x_TI @ weight.to(x.dtype).T).addmm_(h_TR, B_OR.T, alpha=scale)
        # The factors' casts are small; W's, as large as the model, is made again.
        ctx.save_for_backward(x_TI, h_TR, A_RI, B_OR, weight)
        ctx.scale, ctx.shape, ctx.dtypes = scale, x.shape, (lora_A.dtype, lora_B.dtype)
        return y_TO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, h_TR, A_RI, B_OR, weight = ctx.saved_tensors
        scale, (dtype_A, dtype_B) = ctx.scale, ctx.dtypes
        dy_TO = grads[0].reshape(len(x_TI), -1)
        dh_TR = dy_TO @ B_OR  # of x A^T, without the scale
        d_lora_A = (dh_TR.T @ x_TI).to(dtype_A) * scale
        d_lora_B = (dy_TO.T @ h_TR).to(dtype_B) * scale
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy_TO @ weight.to(x_TI.dtype)).addmm_(dh_TR, A_RI, alpha=scale)
            dx = dx.view(ctx.shape)
        return dx, None, d_lora_A, d_lora_B, None
