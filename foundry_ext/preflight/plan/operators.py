"""Operators that torch runs, with the FLOPs and bytes that they ask of a device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "addmm_")
_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "lift_fresh", "alias"}


@dataclass(frozen=True)
class Op:
    """An operator's demand, which is linear in the tokens."""

    kind: str
    """product, attention or pass."""
    flops: tuple[float, float]
    """Fixed, and per token."""
    bytes: tuple[float, float]
    """Read and written: fixed, and per token."""

    def at(self, num_tokens: float) -> tuple[float, float]:
        """Return (FLOPs, bytes) for a number of tokens."""
        return tuple(fixed + slope * num_tokens for fixed, slope in (self.flops, self.bytes))  # pyright: ignore


Sample = tuple[str, float, float]  # kind, FLOPs, bytes


class _Recorder(TorchDispatchMode):
    """Records each operator that runs as a kernel."""

    def __init__(self):
        super().__init__()
        self.samples: list[Sample] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        is_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        found = None if is_view else sample(func, args, kwargs, out)
        if found:
            self.samples.append(found)
        return out


def sample(func: Any, args: Any, kwargs: Any, out: Any) -> Sample | None:
    """Return what an operator asks, or None if it runs no kernel."""
    name = func._schema.name.partition("::")[2]
    inputs, outputs = tensors((args, kwargs)), tensors(out)
    size = num_bytes(inputs) + num_bytes(outputs)
    if name in _FREE or not outputs or size < 64:  # scalars, such as the checks of a batch
        return None
    if "attention" in name:
        return "attention", 0.0, size
    if name in PRODUCTS:
        rows, inner = inputs[-2].shape[-2:]
        batch = inputs[-2].shape[0] if inputs[-2].dim() == 3 else 1
        return "product", 2.0 * batch * rows * inner * inputs[-1].shape[-1], size
    return "pass", 0.0, size


def tensors(tree: Any) -> list[Tensor]:
    """Return the tensors of nested arguments or results."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def num_bytes(found: Sequence[Tensor]) -> float:
    """Return the bytes of tensors in memory."""
    # An expanded tensor is as large in memory as what it repeats.
    return float(sum(x.element_size() * _elements(x) for x in found))


def _elements(x: Tensor) -> int:
    stored = [size for size, stride in zip(x.shape, x.stride(), strict=True) if stride]
    return int(torch.Size(stored).numel()) if x.numel() else 0


def record(work: Callable[[], None]) -> list[Sample]:
    """Return the operators that `work` runs."""
    with _Recorder() as recorder:
        work()
    return recorder.samples


def fit(few: Sequence[Sample], many: Sequence[Sample], tokens: tuple[int, int]) -> list[Op]:
    """Return the operators of two runs of the same work on different numbers of tokens."""
    kinds = [[sample[0] for sample in samples] for samples in (few, many)]
    assert kinds[0] == kinds[1], "the operators depend on the number of tokens"
    return [
        Op(one[0], _line(one[1], other[1], tokens), _line(one[2], other[2], tokens))
        for one, other in zip(few, many, strict=True)
    ]


def _line(few: float, many: float, tokens: tuple[int, int]) -> tuple[float, float]:
    slope = (many - few) / (tokens[1] - tokens[0])
    return few - slope * tokens[0], slope
