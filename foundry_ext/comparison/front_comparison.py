"""Comparison of methods by their whole fronts: dominated areas, and forgetting at equal learning.

Areas. The quantity estimated is the expected area (see hypervolume.py) of a seed's front for a new
seed and new items, with this grid of rates and this number of items. Its estimate is the mean of
the seeds' areas. A front is the best of several noisy points, so luck adds to its area (winner's
curse), and more so with more rates. This is part of the expected area, and equal for methods that
behave equally and have equally many rates. Methods with unequal numbers of rates are not compared.

A budget of forgetting below all points of a front counts as nothing learned, although a lower
learning rate might have learned something within it. So the grids, not the methods, may make a
difference of areas. It is called distinguishable only if it also is, with the same sign, over the
budgets that both fronts cover: from where both have a point, up to the reference. The p-value is
the larger of the two, a valid one for both together (intersection-union test).

Forgetting at a level of learning. The quantity estimated is the expected forgetting of a new
seed's front where it reaches that level, interpolated linearly between neighbouring points of the
front. A method whose whole front learned more has an upper bound instead: it can be found to
forget less than another method, but not more.

If the most that a method learned is not distinguishable from 0, its area is noise cut off at 0, far
from normal. It then has no interval of its own, and there are no levels of learning to compare at.

Intervals vary seeds and items; see seed_item_interval.py. Their coverage and false positives with
known truth are measured by `python -m experiments.simulations.fronts`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TypeVar

import numpy as np

from foundry_ext.comparison.fronts import SeedPoints, matching_levels
from foundry_ext.comparison.hypervolume import default_reference
from foundry_ext.comparison.pairwise import MethodPair
from foundry_ext.comparison.seed_item_interval import (
    Sample,
    interval_of_difference,
    interval_of_mean,
    matched_samples,
)
from foundry_ext.comparison.statistics import Interval, holm
from foundry_ext.comparison.tradeoff import Point


@dataclass(frozen=True)
class FrontValue:
    """One method's area, or its forgetting at a level of learning: the mean over seeds."""

    by_seed: Mapping[int, float]
    """Seeds with a whole front alone."""
    mean: float
    interval: Interval | None
    """Over items only with fewer than three seeds; None if nothing shows the spread."""
    num_bounds: int = 0
    """Seeds whose value is an upper bound, because their front learned more than the level."""


@dataclass(frozen=True, kw_only=True)
class AreaPair(MethodPair):
    """Difference of two methods' areas."""

    covered_from: float | None
    """Least forgetting, at least 0, at which both methods have a point; None if one has none."""
    covered: Interval | None
    """Difference of the areas from `covered_from`; None without an interval, or if `covered_from`
    lies beyond the reference."""

    @property
    def p(self) -> float | None:
        """The larger p-value of the two differences."""
        return max(self.interval.p, self.covered.p) if self.interval and self.covered else None

    @property
    def is_distinguishable(self) -> bool:
        """True if both differences of areas exclude 0 and have the same sign.

        The p-value is that of the less certain one.
        """
        is_same = self.covered is not None and self.covered.estimate * self.difference > 0
        return super().is_distinguishable and is_same


@dataclass(frozen=True, kw_only=True)
class LevelPair(MethodPair):
    """Difference of two methods' forgetting at a level of learning."""

    bound: str | None
    """"first" or "second" if that method's value is an upper bound."""

    @property
    def is_distinguishable(self) -> bool:
        """True if the difference is, and no upper bound is the larger of the two."""
        larger = "first" if self.difference > 0 else "second"
        return super().is_distinguishable and self.bound != larger


_Pair = TypeVar("_Pair", bound=MethodPair)


@dataclass(frozen=True)
class FrontComparison:
    """The comparison of all methods by their fronts."""

    points: Mapping[str, SeedPoints]
    reference: float | None
    """Level of forgetting up to which areas count; None if there are no areas to compare."""
    is_given: bool
    """True if the user gave the reference."""
    areas: Mapping[str, FrontValue]
    """label -> area; without methods that have no seed with a whole front."""
    at_floor: Sequence[str]
    """Methods whose most learned is not distinguishable from 0."""
    area_pairs: Sequence[AreaPair]
    not_compared: Sequence[tuple[str, str, str]]
    """(first, second, reason) of pairs without a difference of areas."""
    levels: Mapping[float, Mapping[str, FrontValue]]
    """level of learning -> label -> forgetting at that level."""
    level_pairs: Sequence[LevelPair]
    """Differences in forgetting at `tested_level`."""

    @property
    def tested_level(self) -> float | None:
        """The middle one of the levels."""
        return _middle(self.levels)


def _middle(levels: Iterable[float]) -> float | None:
    ordered = sorted(levels)
    return ordered[len(ordered) // 2] if ordered else None


def compare_fronts(
    seed_points: Mapping[str, SeedPoints],
    points: Mapping[str, Sequence[Point]],
    reference: float | None = None,
) -> FrontComparison:
    """Compare methods by their fronts.

    Args:
        seed_points: label -> the method's points by seed.
        points: label -> the method's means over seeds, from which the default reference follows.
        reference: level of forgetting up to which areas count; by default, `default_reference`.
    """
    is_given = reference is not None
    if reference is None:
        reference = default_reference(points)
    whole = {label: each for label, each in seed_points.items() if each.seeds}
    areas: dict[str, Sample] = {}
    area_pairs, not_compared = [], []
    if reference is not None and whole:
        areas = {label: each.hypervolumes(reference) for label, each in whole.items()}
        names, not_compared = _comparable(seed_points)
        area_pairs = _area_pairs(whole, areas, names, reference)
    at_floor = [label for label, each in whole.items() if _is_at_floor(each)]
    levels = {
        level: {label: each.forgetting_at(level) for label, each in whole.items()}
        for level in ([] if at_floor else matching_levels(whole))
    }
    tested = _middle(levels)
    return FrontComparison(
        points=seed_points,
        reference=reference,
        is_given=is_given,
        areas={
            label: replace(_value(sample), interval=None) if label in at_floor else _value(sample)
            for label, sample in areas.items()
        },
        at_floor=at_floor,
        area_pairs=area_pairs,
        not_compared=not_compared,
        levels={
            level: {label: _value(*each) for label, each in values.items()}
            for level, values in levels.items()
        },
        level_pairs=_level_pairs(levels[tested]) if tested is not None else [],
    )


def _is_at_floor(points: SeedPoints) -> bool:
    most = points.most_learned()
    interval = interval_of_mean(most) if np.isfinite(list(most.values.values())).all() else None
    return interval is not None and interval.low <= 0


def _comparable(
    seed_points: Mapping[str, SeedPoints],
) -> tuple[list[tuple[str, str]], list[tuple[str, str, str]]]:
    """Return the pairs whose areas may be compared, and the others with the reason."""
    names, others = [], []
    for first, second in combinations(seed_points, 2):
        ours, theirs = seed_points[first], seed_points[second]
        without = [label for label in (first, second) if not seed_points[label].seeds]
        if without:
            reason = f"no seed of {without[0]} was run at each of its learning rates"
            others.append((first, second, reason))
        elif len(ours.rates) != len(theirs.rates):
            reason = f"{len(ours.rates)} and {len(theirs.rates)} learning rates were run"
            others.append((first, second, reason))
        else:
            names.append((first, second))
    return names, others


def _value(sample: Sample, num_bounds: int = 0) -> FrontValue:
    return FrontValue(sample.values, sample.mean, interval_of_mean(sample), num_bounds)


def _area_pairs(
    seed_points: Mapping[str, SeedPoints],
    areas: Mapping[str, Sample],
    names: Sequence[tuple[str, str]],
    reference: float,
) -> list[AreaPair]:
    pairs = []
    for first, second in names:
        both = seed_points[first], seed_points[second]
        start = max(0.0, *(each.least_forgotten for each in both))
        covered = None
        if start < reference:
            _, covered, _ = _difference(*(each.hypervolumes(reference, start) for each in both))
        difference, interval, seeds = _difference(areas[first], areas[second])
        covered_from = start if np.isfinite(start) else None
        pairs.append(
            AreaPair(
                first=first,
                second=second,
                difference=difference,
                interval=interval,
                adjusted_p=None,
                seeds=seeds,
                covered_from=covered_from,
                covered=covered,
            )
        )
    return _with_holm(pairs)


def _level_pairs(samples: Mapping[str, tuple[Sample, int]]) -> list[LevelPair]:
    """Compare every pair of (sample, seeds with an upper bound), unless both have bounds."""
    pairs = []
    for first, second in combinations(samples, 2):
        (ours, our_bounds), (theirs, their_bounds) = samples[first], samples[second]
        if our_bounds and their_bounds:
            continue
        bound = "first" if our_bounds else "second" if their_bounds else None
        difference, interval, seeds = _difference(ours, theirs)
        pair = LevelPair(
            first=first,
            second=second,
            difference=difference,
            interval=interval,
            adjusted_p=None,
            seeds=seeds,
            bound=bound,
        )
        pairs.append(pair)
    return _with_holm(pairs)


def _difference(
    first: Sample, second: Sample
) -> tuple[float, Interval | None, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return first minus second, its interval, and the seeds used of both."""
    ours, theirs, paired = matched_samples(first, second)
    interval = interval_of_difference(ours, theirs, paired=paired)
    return ours.mean - theirs.mean, interval, (tuple(ours.values), tuple(theirs.values))


def _with_holm(pairs: Sequence[_Pair]) -> list[_Pair]:
    adjusted = holm([pair.p for pair in pairs])
    return [replace(pair, adjusted_p=p) for pair, p in zip(pairs, adjusted, strict=True)]
