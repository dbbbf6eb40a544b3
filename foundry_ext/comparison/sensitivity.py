"""Sensitivity to the learning rate: what a method loses beside its best learning rate."""

from dataclasses import dataclass
from math import isclose

import numpy as np

from foundry_ext.comparison.comparison import Comparison
from foundry_ext.comparison.fronts import SeedPoints
from foundry_ext.comparison.interval import Interval
from foundry_ext.comparison.seed_item_interval import (
    Sample,
    interval_of_difference,
    matched_samples,
)

_TOLERANCE = 0.05  # relative, of the factor between two rates: 1e-5, 2.5e-5 and 6.4e-5 are even


@dataclass(frozen=True)
class SensitivityPair:
    """Difference of two methods in learning lost beside the best rate, first minus second."""

    factor: float
    """Ratio of the rates beside the best one to it, up and down; the same for both methods."""
    lost: tuple[float, float]
    """Learning at the best rate minus the mean of that at the two rates beside it."""
    difference: float
    interval: Interval | None


def compare_sensitivity(comparison: Comparison, first: str, second: str) -> SensitivityPair | str:
    """Compare what two methods lose at a factor above and below their best learning rates.

    The best rate is the best of several noisy ones, so both losses are slightly overestimated.

    Returns:
        What runs it would take, if these do not show it.
    """
    points = [comparison.fronts.points[label] for label in (first, second)]
    best = [comparison.best[label].learning_rate for label in (first, second)]
    if not all(len(each.seeds) for each in points):
        return "the same seeds at every learning rate"
    ours, theirs = map(_beside, points, best)
    shared = [
        (factor, low, high, *theirs[other])
        for factor, (low, high) in sorted(ours.items())
        for other in theirs
        if isclose(factor, other, rel_tol=_TOLERANCE)
    ]
    if not shared:
        return "learning rates at one factor above and below the best one of both methods"
    factor, *columns = shared[0]
    samples = [
        _lost(each, each.rates.index(rate), pair)
        for each, rate, pair in zip(points, best, (columns[:2], columns[2:]), strict=True)
    ]
    if not all(np.isfinite(list(sample.values.values())).all() for sample in samples):
        return "runs beside the best learning rate that do not diverge"
    mine, other, paired = matched_samples(*samples)
    interval = interval_of_difference(mine, other, paired=paired)
    return SensitivityPair(factor, (mine.mean, other.mean), mine.mean - other.mean, interval)


def _beside(points: SeedPoints, best: float) -> dict[float, tuple[int, int]]:
    """Return factor -> the columns of the rates that are smaller and larger than best by it."""
    rates = points.rates
    return {
        high / best: (rates.index(low), rates.index(high))
        for high in rates
        for low in rates
        if low < best < high and isclose(high / best, best / low, rel_tol=_TOLERANCE)
    }


def _lost(points: SeedPoints, best: int, beside: list[int]) -> Sample:
    def lost(learning: np.ndarray) -> np.ndarray:
        return learning[..., best] - learning[..., beside].mean(-1)

    values = dict(zip(points.seeds, map(float, lost(points.learning)), strict=True))
    resampled = lost(points.replicates[0]) if points.replicates else None
    return Sample(values, resampled, points.num_items)
