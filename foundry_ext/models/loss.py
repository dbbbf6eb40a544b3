"""Cross-entropy of a linear head at labelled positions, without the logits of all positions.

L labelled positions, D hidden size, V vocabulary. [L, V] never exists: the head runs over chunks of
positions, and a chunk's gradient is taken at once, while its probabilities are at hand (as Liger's
fused kernel does), so that the backward pass multiplies by no logits again.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from foundry_ext.utils.constants import IGNORE_INDEX
from foundry_ext.utils.errors import UserError

# Elements of one chunk's fp32 logits: 2**24 is 64 MiB, small beside a model, large beside a kernel.
CHUNK_ELEMENTS = 2**24

LOSSES = ("chunked", "compiled", "liger")


class LossSum(NamedTuple):
    """Sums over labelled positions. `loss`: fp32 nats. `num_correct`: int64, argmax is label."""

    loss: Tensor
    num_correct: Tensor


def labelled_positions(labels: Tensor, num_loss_tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """Where a hidden state predicts a label, and that label.

    `labels` are unshifted, so that the state at t predicts `labels[t + 1]`; a document's first
    label is always -100, which keeps a document's last state from predicting its neighbour.

    Args:
        labels: [T] int64, -100 where there is no loss.
        num_loss_tokens: the count of labels, where the caller knows it: then no device
            synchronisation is needed to find it out.

    Returns:
        (positions, targets), each [L] int64.

    Example: labels -100 6 7 -100 9 give positions 0 1 3 and targets 6 7 9.
    """
    has_label = labels[1:] != IGNORE_INDEX
    if num_loss_tokens is None:
        positions = has_label.nonzero().squeeze(-1)
    else:
        order = torch.argsort(has_label.to(torch.uint8), descending=True, stable=True)
        positions = order[:num_loss_tokens]
    return positions, labels[1:][positions]


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of `hidden @ weight.T`; gradients are computed in the forward pass."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, target: Tensor, dtype: torch.dtype, compiled: bool
    ) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        weight_in = weight.to(dtype)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        for rows in _chunks(hidden.shape[0], weight.shape[0]):
            hidden_in, labels = hidden[rows].to(dtype), target[rows, None]
            # One row would be compiled by itself, for torch takes a size of 1 as fixed.
            fused = compiled and len(labels) > 1
            loss_of = _compiled_loss_and_gradient() if fused else _loss_and_gradient
            chunk_loss, grad_logits = loss_of(hidden_in @ weight_in.t(), labels)
            loss += chunk_loss
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ weight_in
            if grad_weight is not None:
                grad_weight += grad_logits.t() @ hidden_in
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else (grad_hidden * grad).to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad).to(ctx.weight_dtype),
            None,
            None,
            None,
        )


def _loss_and_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy, fp32, of logits [R, V] at labels [R, 1], and its gradient [R, V]."""
    log_prob = logits.float().log_softmax(-1)
    loss = -log_prob.gather(1, labels).sum()
    gradient = log_prob.exp_()  # the probabilities, then minus one at the label
    gradient.scatter_add_(1, labels, gradient.new_full((), -1.0).expand_as(labels))
    return loss, gradient.to(logits.dtype)


@functools.cache
def _compiled_loss_and_gradient() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The same, written for a compiler: it makes two passes over the logits instead of six."""

    def fused(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        x = logits.float()
        log_sum = x.logsumexp(-1, keepdim=True)
        loss = (log_sum - x.gather(1, labels)).sum()
        is_label = torch.arange(x.shape[1], device=x.device) == labels
        return loss, ((x - log_sum).exp() - is_label).to(logits.dtype)

    # The last chunk has any number of rows.
    return torch.compile(fused, dynamic=True)  # pyright: ignore[reportReturnType]


def _chunks(num_rows: int, vocabulary: int) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, *, implementation: str = "chunked"
) -> Tensor:
    """Summed cross-entropy of the linear head, differentiable in `hidden` and `weight`.

    Matrix products run in autocast's dtype where autocast is on; the softmax, the sum and the
    accumulation of the head's gradient are fp32 always. With no rows it is 0, and still attached to
    both inputs, so that data-parallel ranks with nothing to learn from do not make others wait.

    Args:
        hidden: [L, D]; weight: [V, D]; target: [L] int64, no -100 among them.
        implementation: "chunked" (any device), "compiled" (the same, its softmax fused by
            torch.compile) or "liger" (Triton, GPU only).

    Returns:
        fp32 scalar, nats summed over L.
    """
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
    with torch.autocast(device, enabled=False):
        if implementation == "liger":
            return _liger(hidden.to(dtype), weight, target)
        compiled = implementation == "compiled"
        return _ChunkedLinearCrossEntropy.apply(hidden, weight, target, dtype, compiled)  # pyright: ignore[reportReturnType]


def _liger(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import (  # pyright: ignore[reportMissingImports]
        LigerFusedLinearCrossEntropyFunction,
    )

    if target.numel() == 0:  # its kernel divides by the number of rows
        return (hidden.sum() + weight.sum()).float() * 0.0
    return LigerFusedLinearCrossEntropyFunction.apply(
        hidden, weight.to(hidden.dtype), target, None, None, IGNORE_INDEX, 0.0, 0.0, "sum"
    )[0].float()


@torch.no_grad()
def evaluate_linear_head(hidden: Tensor, weight: Tensor, target: Tensor) -> LossSum:
    """Summed cross-entropy and number of correct predictions, a chunk at a time.

    Args and dtypes as in `linear_cross_entropy`.
    """
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    num_correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
    for rows in _chunks(hidden.shape[0], weight.shape[0]):
        logits = torch.nn.functional.linear(hidden[rows].to(weight.dtype), weight).float()
        loss += torch.nn.functional.cross_entropy(logits, target[rows], reduction="sum")
        num_correct += (logits.argmax(-1) == target[rows]).sum()
    return LossSum(loss, num_correct)


def check_loss(name: str) -> str:
    """Returns `name` if it can be used here, else raises ValueError saying how to get it."""
    if name not in LOSSES:
        raise UserError(f"loss: {name!r} is unknown; choose one of {', '.join(LOSSES)}")
    if name == "liger":
        if not torch.cuda.is_available():
            raise UserError("loss: 'liger' needs a GPU; use 'chunked', which runs anywhere")
        try:
            import liger_kernel  # noqa: F401  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise UserError(
                "loss: 'liger' needs liger-kernel; pip install 'foundry-ext[gpu]' or use 'chunked'"
            ) from error
    return name
