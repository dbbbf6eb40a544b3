"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), indexed by `position_ids`.

T tokens, H heads, N head dimension. Pairs are Llama's: dimension i rotates with i + N/2.
"""

import torch
from torch import Tensor


def rotary_cos_sin(
    position_ids: Tensor, *, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the cosine and sine of every position's angles, computed in fp32 and then cast.

    Example: with head_dim 4 and theta 100, position 3 has the angles 3 * 100**0 and 3 * 100**-0.5.

    Args:
        position_ids: [..., T] int64, restarting at 0 in every document.
        head_dim: N, even.
        theta: base of the frequencies (`rope_theta` in the configuration).
        dtype: dtype of the result; like Hugging Face, pass the residual stream's.

    Returns:
        (cos, sin), each [..., T, N/2].
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device)
    frequency = 1.0 / theta ** (exponent / head_dim)
    angle = position_ids[..., None].float() * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


class _Rotate(torch.autograd.Function):
    """Rotation of the pairs (i, i + N/2); its gradient is the inverse rotation."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate every head of `x` by its token's angles.

    Args:
        x: [..., T, H, N].
        cos: [..., T, N/2] from `rotary_cos_sin`.
        sin: [..., T, N/2] from `rotary_cos_sin`.

    Returns:
        [..., T, H, N] in the wider of the dtypes of `x` and `cos`.
    """
    return _Rotate.apply(x, cos[..., None, :], sin[..., None, :])  # pyright: ignore[reportReturnType]
