"""Cross-entropy of a linear head at labelled positions, without the logits of all positions.

L labelled positions, D hidden size, V vocabulary. [L, V] never exists: the head runs over chunks of
positions. A chunk's gradient is computed in the forward pass, from its probabilities (as in Liger's
fused kernel), so the backward pass does not compute logits again.
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
# A GPU takes larger chunks: the head's gradient [V, D] is added up once a chunk, and 16,384 tokens
# need 12 chunks of kernels, not 48.
GPU_CHUNK_FACTOR = 4

LOSSES = ("auto", "chunked", "compiled", "liger")


class LossSum(NamedTuple):
    """Sums over labelled positions."""

    loss: Tensor
    """fp32 scalar, nats."""
    num_correct: Tensor
    """int64 scalar, positions whose label is the argmax."""


def labelled_positions(labels: Tensor, num_loss_tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the positions whose hidden state predicts a label, and those labels.

    Example: labels -100 6 7 -100 9 give positions 0 1 3 and targets 6 7 9.

    `labels` are unshifted: the state at t predicts `labels[t + 1]`. A document's first label is
    always -100, so a document's last state never predicts a token of the next document.

    Args:
        labels: [T] int64, -100 without loss.
        num_loss_tokens: number of labels, if known. Without it, counting them synchronises with the
            device.

    Returns:
        (positions, targets), each [L] int64.
    """
    has_label = labels[1:] != IGNORE_INDEX
    if num_loss_tokens is None:
        positions = has_label.nonzero().squeeze(-1)
    else:
        # Labelled positions first, in order. nonzero would synchronise to learn its result's size.
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
        for rows in chunks(hidden.shape[0], weight):
            hidden_in, labels = hidden[rows].to(dtype), target[rows, None]
            # torch.compile treats a size of 1 as static, so one row would compile separately.
            fused = compiled and len(labels) > 1
            loss_and_gradient = _compiled_loss_and_gradient() if fused else _loss_and_gradient
            chunk_loss, grad_logits = loss_and_gradient(hidden_in @ weight_in.t(), labels)
            loss += chunk_loss
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ weight_in
            if grad_weight is not None and grad_weight.dtype == dtype:
                grad_weight.addmm_(grad_logits.t(), hidden_in)
            elif grad_weight is not None:
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
    """Return the summed fp32 cross-entropy of logits [R, V] at labels [R, 1], and its gradient."""
    log_prob = logits.float().log_softmax(-1)
    loss = -log_prob.gather(1, labels).sum()
    gradient = log_prob.exp_()  # the probabilities, then minus one at the label
    gradient.scatter_add_(1, labels, gradient.new_full((), -1.0).expand_as(labels))
    return loss, gradient.to(logits.dtype)


@functools.cache
def _compiled_loss_and_gradient() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return a compiled `_loss_and_gradient`: two passes over the logits instead of six."""

    def fused(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        x = logits.float()
        log_sum = x.logsumexp(-1, keepdim=True)
        loss = (log_sum - x.gather(1, labels)).sum()
        is_label = torch.arange(x.shape[1], device=x.device) == labels
        return loss, ((x - log_sum).exp() - is_label).to(logits.dtype)

    # Dynamic, because the last chunk may have any number of rows.
    return torch.compile(fused, dynamic=True)  # pyright: ignore[reportReturnType]


def chunk_rows(vocabulary: int, device: str) -> int:
    """Return how many rows of logits [..., V] exist at a time on this type of device."""
    factor = GPU_CHUNK_FACTOR if device == "cuda" else 1
    return max(1, CHUNK_ELEMENTS * factor // vocabulary)


def chunks(num_rows: int, weight: Tensor) -> list[slice]:
    """Return the rows of logits [num_rows, V] that exist at a time, for a head [V, D]."""
    size = chunk_rows(weight.shape[0], weight.device.type)
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, *, implementation: str = "chunked"
) -> Tensor:
    """Return the summed cross-entropy of the linear head, differentiable in hidden and weight.

    Matrix products run in autocast's dtype if autocast is on. The softmax, the sum and the
    accumulation of the head's gradient are always in fp32. Without rows the result is 0 but still
    has gradients for both inputs, so a data-parallel rank without labels does not block the others.

    Args:
        hidden: [L, D].
        weight: [V, D].
        target: [L] int64, without -100.
        implementation: "chunked" (any device), "compiled" (the same with its softmax fused by
            torch.compile) or "liger" (experimental: Triton, GPU only; the host waits in it
            three times a call, to read the number of labels and to compare a gradient).

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
    options = (None, None, IGNORE_INDEX, 0.0, 0.0, "sum", None, False)
    accumulate_in = torch.float32  # by default its sum over chunks is in bf16
    return LigerFusedLinearCrossEntropyFunction.apply(
        hidden, weight.to(hidden.dtype), target, *options, accumulate_in
    )[0].float()


@torch.no_grad()
def evaluate_linear_head(hidden: Tensor, weight: Tensor, target: Tensor) -> LossSum:
    """Return the summed cross-entropy and the number of correct predictions, without gradients.

    Arguments and dtypes are those of `linear_cross_entropy`.
    """
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    num_correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
    for rows in chunks(hidden.shape[0], weight):
        logits = torch.nn.functional.linear(hidden[rows].to(weight.dtype), weight).float()
        loss += torch.nn.functional.cross_entropy(logits, target[rows], reduction="sum")
        num_correct += _num_correct(logits, target[rows])
    return LossSum(loss, num_correct)


def _num_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the number of rows of logits [R, V] whose argmax is the label [R].

    On a CPU the labels' logits are overwritten.
    """
    if logits.device.type != "cpu":
        return (logits.argmax(-1) == labels).sum()
    # argmax takes longer than the softmax there. A label is the argmax if its logit is above all
    # others; of equal ones, which are rare, the first counts.
    own = logits.gather(1, labels[:, None])
    others = logits.scatter_(1, labels[:, None], -torch.inf).amax(-1, keepdim=True)
    tied = (own == others)[:, 0]
    return (own > others).sum() + (logits[tied].argmax(-1) > labels[tied]).sum()


def check_loss(name: str) -> str:
    """Return the name of a loss implementation after checking that it can run here.

    "auto" is "chunked": train.py decides otherwise before the model is built.

    Raises:
        UserError: it is unknown, needs a GPU, or is not installed.
    """
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
    return "chunked" if name == "auto" else name
