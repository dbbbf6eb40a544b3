"""An interval from independent sources of variation, such as seeds and items, with its p-value."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scipy import optimize, special

LEVEL = 0.95
_LEAST_TAIL = 1e-15  # one-sided; smaller p-values are not told apart
Part = tuple[float, float]
"""Squared standard error and degrees of freedom of one source of variation."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval and the two-sided p-value against 0."""

    estimate: float
    low: float
    high: float
    p: float
    standard_error: float
    kind: str
    """Source of variation: "items", "seeds" or "seeds and items"."""

    @property
    def includes_zero(self) -> bool:
        return self.low <= 0 <= self.high


def interval_from_parts(
    estimate: float,
    parts: Sequence[Part],
    kind: str,
    half_width: Callable[[float, Sequence[Part]], float],
) -> Interval:
    """Return the interval of an estimate with independent sources of variation.

    The p-value inverts the interval.

    Args:
        estimate: the estimate.
        parts: squared standard error and degrees of freedom of each source.
        kind: the sources in words.
        half_width: a function of a one-sided tail and of the parts that vary.
    """
    error = math.sqrt(sum(variance for variance, _ in parts))
    varying = [part for part in parts if part[0] > 0]
    if is_rounding(error, estimate) or not varying:
        p = float(is_rounding(estimate, 1.0))
        return Interval(estimate, estimate, estimate, p, error, kind)
    half = half_width((1 - LEVEL) / 2, varying)
    p = 2 * _LEAST_TAIL
    if half_width(0.5, varying) >= abs(estimate):  # an estimate of 0; the quantile may be rounded
        p = 1.0
    elif half_width(_LEAST_TAIL, varying) > abs(estimate):
        # Twice the one-sided tail at which the interval just touches 0.
        touching = optimize.root_scalar(
            lambda tail: half_width(tail, varying) - abs(estimate),
            bracket=(_LEAST_TAIL, 0.5),
            method="brentq",
            xtol=1e-12,
        )
        p = 2 * touching.root
    return Interval(estimate, estimate - half, estimate + half, p, error, kind)


def mover(tail: float, parts: Sequence[Part]) -> float:
    """Return the root of the summed squares of the parts' own half-widths (Zou and Donner 2008)."""
    return math.sqrt(sum(variance * special.stdtrit(df, tail) ** 2 for variance, df in parts))


def is_rounding(small: float, large: float) -> bool:
    """Return whether `small` is rounding error, such as the spread of copies of one run."""
    return abs(small) <= 1e-12 * max(1.0, abs(large))
