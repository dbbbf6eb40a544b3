"""Trade-off of learning and forgetting: the Pareto front, and forgetting at matched learning."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import fmean

import numpy as np

from foundry_ext.comparison.metrics import Metric, curve, final_value
from foundry_ext.comparison.pairwise import interval_of_difference, is_distinguishable
from foundry_ext.comparison.runs import Run
from foundry_ext.comparison.statistics import MIN_SEEDS, Interval, holm, over_seeds


@dataclass(frozen=True)
class Point:
    """A method at one learning rate: the mean over its runs at the end of training."""

    label: str
    learning_rate: float
    learning: float
    forgetting: float
    seeds: tuple[int, ...]

    @property
    def position(self) -> tuple[float, float]:
        return self.learning, self.forgetting


def points(groups: Mapping[str, Sequence[Run]], x: Metric, y: Metric) -> list[Point]:
    """Return one point for every method at every learning rate."""
    result = []
    for label, group in groups.items():
        for rate in sorted({run.learning_rate for run in group}):
            runs = [run for run in group if run.learning_rate == rate]
            learned, forgot = (fmean(final_value(run, axis) for run in runs) for axis in (x, y))
            result.append(Point(label, rate, learned, forgot, tuple(run.seed for run in runs)))
    return result


def pareto_front(candidates: Sequence[Point]) -> list[Point]:
    """Return the points that no other point dominates, by rising learning.

    Equal points are all on the front.
    """
    front = [
        point
        for point in candidates
        if not any(
            other.learning >= point.learning
            and other.forgetting <= point.forgetting
            and other.position != point.position
            for other in candidates
        )
    ]
    return sorted(front, key=lambda point: point.position)


def first_crossing(path: np.ndarray, level: float) -> float | None:
    """Return the forgetting at which a path first reaches a level of learning.

    Args:
        path: [n, 2], learning and forgetting, linear between the points.
        level: the level of learning.

    Returns:
        None if the level lies outside the path, because nothing is extrapolated.
    """
    learned, forgot = path[:, 0], path[:, 1]
    for index in range(len(path)):
        if learned[index] == level:
            return float(forgot[index])
        step = learned[index - 1 : index + 1]
        if index and min(step) < level < max(step):
            share = (level - step[0]) / (step[1] - step[0])
            return float(forgot[index - 1] + share * (forgot[index] - forgot[index - 1]))
    return None


@dataclass(frozen=True)
class Matched:
    """One method's forgetting at one level of learning."""

    by_seed: Mapping[int, float]
    """Forgetting between evaluations of each seed's run at the chosen learning rate. Seeds that do
    not reach the level are missing."""
    num_seeds: int
    mean: float | None
    """Mean over all seeds; None if one of them does not reach the level."""
    interval: Interval | None
    """Interval over seeds; None with fewer than three."""
    is_early: bool
    """True if a run reached the level before its first evaluation after step 0. Its value then lies
    on the straight line from the base model, not between two measured points."""
    over_rates: float | None
    """Forgetting between neighbouring points of the method's front over learning rates; None if the
    level lies outside."""
    at_most: float | None
    """Upper bound, for a method that learned more than the level at every learning rate: the least
    it forgot at any of them. None for other methods."""


def matched(
    chosen: Sequence[Run],
    all_runs: Sequence[Run],
    learning: Metric,
    forgetting: Metric,
    level: float,
) -> Matched:
    """Return one method's forgetting at a level of learning.

    Args:
        chosen: the method's runs at its chosen learning rate, one per seed.
        all_runs: its runs at every learning rate.
        learning: metric that has the level.
        forgetting: metric to return.
        level: the level of learning.
    """
    by_seed = {}
    is_early = False
    for run in chosen:
        path = np.stack([curve(run, learning)[:, 1], curve(run, forgetting)[:, 1]], 1)
        crossing = first_crossing(path, level)
        if crossing is not None:
            by_seed[run.seed] = crossing
            is_early |= bool(path[1, 0] > level)
    complete = len(by_seed) == len(chosen)
    # [points, 2], by rising learning. In the order of the learning rates, the path would lead
    # through rates that are worse in both, and might cross the level there.
    front = np.array(
        [point.position for point in pareto_front(points({"": all_runs}, learning, forgetting))]
    )
    over_rates = first_crossing(front, level) if len(front) > 1 else None
    is_below = over_rates is None and bool(front[0, 0] >= level)
    values = list(by_seed.values())
    return Matched(
        by_seed=by_seed,
        num_seeds=len(chosen),
        mean=float(np.mean(values)) if complete else None,
        interval=over_seeds(values) if complete and len(values) >= MIN_SEEDS else None,
        is_early=is_early,
        over_rates=over_rates,
        at_most=float(front[0, 1]) if is_below else None,
    )


@dataclass(frozen=True)
class MatchedPair:
    """Difference of two methods, first minus second, in forgetting at one level of learning."""

    first: str
    second: str
    difference: float
    interval: Interval | None
    """Interval over seeds; None with fewer than three."""
    adjusted_p: float | None
    """p-value after Holm's correction over the pairs."""

    @property
    def is_distinguishable(self) -> bool:
        """True if both the interval and the adjusted p-value exclude a difference of 0."""
        return is_distinguishable(self.interval, self.adjusted_p)


def matched_pairs(methods: Mapping[str, Matched]) -> list[MatchedPair]:
    """Compare every two methods whose runs all reach the level, paired if their seeds agree."""
    pairs = []
    for first, second in combinations(methods, 2):
        ours, theirs = methods[first], methods[second]
        if ours.mean is None or theirs.mean is None:
            continue
        values = [np.array([x for _, x in sorted(side.by_seed.items())]) for side in (ours, theirs)]
        paired = ours.by_seed.keys() == theirs.by_seed.keys()
        interval = interval_of_difference(values, None, paired=paired)
        pairs.append(MatchedPair(first, second, ours.mean - theirs.mean, interval, None))
    adjusted = holm([pair.interval.p if pair.interval else None for pair in pairs])
    return [replace(pair, adjusted_p=p) for pair, p in zip(pairs, adjusted, strict=True)]


def matching_levels(chosen: Mapping[str, Sequence[Run]], learning: Metric) -> list[float]:
    """Return the levels of learning to match at.

    They are half of what every run reaches at some evaluation, all of it, and 95 % of the most that
    a method ends with. There are none if a run never learns anything.
    """
    reached = min(
        float(np.nanmax(curve(run, learning)[:, 1])) for runs in chosen.values() for run in runs
    )
    most = max(np.mean([final_value(run, learning) for run in runs]) for runs in chosen.values())
    if reached <= 0:
        return []
    return [reached / 2, reached] + ([0.95 * float(most)] if 0.95 * most > reached else [])
