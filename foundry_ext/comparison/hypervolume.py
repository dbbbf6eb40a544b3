"""Area that a set of (learning, forgetting) points dominates: the two-dimensional hypervolume.

A point dominates every place with less learning and more forgetting. The area counts from learning
0, which is the base model, and from a start to a reference level of forgetting:

    area = integral over budgets b from the start to the reference of
           the most learned by a point that forgot at most b, and at least 0

The start is 0, so a point that forgets less than nothing counts as forgetting nothing. Divided by
the reference, the area is then the mean learning over budgets of forgetting from 0 to the
reference. So it rewards a method for learning at every price, while "the best learning rate by
learning" asks what is learned at any price.

Worked example, reference 3: points (learning 2, forgetting 1) and (3, 2) dominate
2 * (2 - 1) + 3 * (3 - 2) = 5.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from foundry_ext.comparison.tradeoff import Point, pareto_front

MARGIN = 1.1
"""Ratio of the default reference to the largest forgetting on a front.

It is above 1 so that the end of that front counts too. Ishibuchi et al. 2018, Evolutionary
Computation 26, advise a reference slightly worse than the nadir point."""


def hypervolume(
    learning: np.ndarray, forgetting: np.ndarray, reference: float, start: float = 0.0
) -> np.ndarray:
    """Return the dominated area from learning 0, and from the start to the reference level.

    The formula is exact: sorted by forgetting, every point adds a strip up to the next point's
    forgetting, as long as the most learned so far.

    Args:
        learning: [..., K], of K points; -inf for a run that diverged.
        forgetting: [..., K]; inf for a run that diverged.
        reference: level of forgetting; points that forget more add nothing.
        start: level of forgetting, at most the reference; points that forget less count from here.

    Returns:
        [...].
    """
    order = np.argsort(forgetting, axis=-1)
    budgets = np.clip(np.take_along_axis(forgetting, order, -1), start, reference)
    learned = np.maximum(np.take_along_axis(learning, order, -1), 0.0)
    most = np.maximum.accumulate(learned, axis=-1)
    end = np.full((*budgets.shape[:-1], 1), float(reference))
    return (most * np.diff(budgets, axis=-1, append=end)).sum(-1)


def default_reference(points: Mapping[str, Sequence[Point]]) -> float | None:
    """Return a reference level of forgetting from all methods' fronts, the same for all of them.

    It is the largest forgetting on any method's own front, times `MARGIN`, rounded up to two
    significant digits. So every method's whole front counts. A learning rate that destroyed more
    without learning more lies on no front and does not move it.

    Args:
        points: label -> the method's points, one per learning rate.

    Returns:
        None if no method both learned and forgot anything.
    """
    most = max(
        (
            point.forgetting
            for each in points.values()
            for point in pareto_front(each)
            if point.learning > 0
        ),
        default=0.0,
    )
    return round_up(MARGIN * most) if most > 0 else None


def round_up(value: float) -> float:
    """Return a positive value rounded up to two significant digits."""
    digits = 1 - math.floor(math.log10(value))
    return float(f"{math.ceil(round(value * 10**digits, 6)) / 10**digits:.2g}")
