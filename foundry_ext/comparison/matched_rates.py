"""Learning rates at which all methods learn the same, interpolated on each method's grid.

The level is a share of what the method that learns least learns at its best rate, so every method
reaches it. A rate is interpolated linearly in learning over the logarithm of the rate, where
learning first reaches the level, which is below the method's best rate.

Example, a level of 1.0: a method that learns 0.8 at 1e-3 and 1.2 at 4e-3 is matched at 2e-3.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import exp, log

from foundry_ext.utils.errors import UserError

SHARE = 0.9

RatePoints = Sequence[tuple[float, float]]
"""(learning rate, learned) of a method's runs, by rising rate."""


def match_learning_rates(
    by_method: Mapping[str, RatePoints], *, share: float = SHARE
) -> tuple[float, dict[str, float]]:
    """Return the common level of learning, and the learning rate of each method that reaches it.

    Args:
        by_method: the points of each method, in any unit of learning.
        share: of what the method that learns least learns at its best rate, in (0, 1].

    Raises:
        UserError: a method has no points, or learns more than the level at its lowest rate.
    """
    missing = [method for method, points in by_method.items() if not points]
    if missing:
        raise UserError(
            f"{', '.join(missing)}: no run that finished without diverging, and the level of"
            " learning depends on all methods"
        )
    level = share * min(max(learned for _, learned in points) for points in by_method.values())
    return level, {method: _rate(method, points, level) for method, points in by_method.items()}


def _rate(method: str, points: RatePoints, level: float) -> float:
    for (low, below), (high, above) in pairwise(points):
        if below < level <= above:
            part = (level - below) / (above - below)
            return exp(log(low) + part * (log(high) - log(low)))
    raise UserError(
        f"{method}: no two neighbouring rates of {[rate for rate, _ in points]} learn less and more"
        f" than {level:.3f}; add a lower rate to its grid"
    )
