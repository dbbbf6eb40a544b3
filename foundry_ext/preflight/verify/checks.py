"""The result of one check of a verification, and its measures."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Check:
    """One promise, whether it holds, and the figures behind that."""

    name: str
    passed: bool
    detail: str


def relative_distance(expected: Tensor, found: Tensor) -> float:
    """Return the norm of the difference over the norm."""
    return float((expected - found).norm() / expected.norm().clamp(min=1e-9))


def largest(errors: Mapping[str, float]) -> tuple[str, float]:
    """Return the place of the largest error and the error; NaN is larger than any number."""
    size = {where: math.inf if math.isnan(error) else error for where, error in errors.items()}
    where = max(size, key=size.__getitem__, default="nowhere")
    return where, errors.get(where, 0.0)
