"""Findings: each method's interval and each pair's difference, as numbers and as a sentence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from foundry_ext.comparison.metrics import Metric, final_value, item_matrix, outcomes
from foundry_ext.comparison.power import ALPHA, mcnemar_items_needed, seeds_and_items_needed
from foundry_ext.comparison.runs import Run
from foundry_ext.comparison.statistics import (
    MIN_SEEDS,
    Interval,
    McNemar,
    bootstrap_items,
    holm,
    mcnemar,
    over_seeds,
    seeds_and_items,
    two_level_bootstrap,
    unpaired_seeds_and_items,
)


@dataclass(frozen=True)
class Summary:
    """A method's mean of one metric at its chosen learning rate."""

    label: str
    metric: Metric
    by_seed: Mapping[int, float]
    mean: float
    interval: Interval | None
    """None for a single seed without items, because nothing shows the spread."""
    num_items: int | None
    two_level: tuple[float, float] | None
    """Limits of the two-level bootstrap, for reference only; see statistics.py."""


def is_distinguishable(interval: Interval | None, adjusted_p: float | None) -> bool:
    """Return whether both the interval and the adjusted p-value exclude a difference of 0."""
    if interval is None or adjusted_p is None:
        return False
    return not interval.includes_zero and adjusted_p < ALPHA


@dataclass(frozen=True, kw_only=True)
class MethodPair:
    """Difference of two methods, first minus second."""

    first: str
    second: str
    difference: float
    interval: Interval | None
    adjusted_p: float | None
    """p-value after Holm's correction over the pairs."""
    seeds: tuple[tuple[int, ...], tuple[int, ...]]
    """Seeds used of the first and of the second method; equal if they are paired."""

    @property
    def in_general(self) -> bool:
        """True if seeds vary in the interval, so that it holds for methods, not only for runs."""
        return self.interval is not None and self.interval.kind.startswith("seeds")

    @property
    def p(self) -> float | None:
        """p-value before Holm's correction."""
        return self.interval.p if self.interval else None

    @property
    def is_distinguishable(self) -> bool:
        """True if both the interval and the adjusted p-value exclude a difference of 0."""
        return is_distinguishable(self.interval, self.adjusted_p)


@dataclass(frozen=True, kw_only=True)
class PairwiseComparison(MethodPair):
    """Difference of two methods in one metric; the correction is over this metric's pairs."""

    metric: Metric
    num_items: int | None
    mcnemar: McNemar | None
    """McNemar's test on one run of each method, with the seeds `mcnemar_seeds`."""
    mcnemar_seeds: tuple[int, int] | None
    adjusted_mcnemar: float | None
    seeds_needed: int | None
    """Seeds needed if the items stay fixed; None if no number suffices."""
    items_needed: int | None
    """Items needed if the seeds stay fixed; None if no number suffices."""
    both_needed: tuple[int, int] | None
    """(seeds, items) needed together, if neither alone suffices."""
    num_tests: int
    """Number of pairs of this metric; the needed numbers divide the 5 % by it."""

    @property
    def p(self) -> float | None:
        """McNemar's p-value for a single pair of runs with a binary metric, else the interval's."""
        if self.interval is None:
            return None
        single = len(self.seeds[0]) == len(self.seeds[1]) == 1
        return self.mcnemar.p if self.mcnemar and single else self.interval.p

    @property
    def sentence(self) -> str:
        """The finding in words."""
        metric = self.metric
        scope = "" if self.in_general else "In these runs, "
        size = f"{metric.show(self.difference, signed=True)} {metric.unit}"
        not_distinguishable = (
            f"{self.first} and {self.second} are not distinguishable in {metric.role} on"
            f" {metric.subject}: difference {size}"
        )
        if self.interval is None:
            return (
                f"{not_distinguishable}, with neither items nor {MIN_SEEDS} seeds to show its"
                " spread."
            )
        low, high = self.interval.low, self.interval.high
        if self.is_distinguishable:
            more, less = self.first, self.second
            if self.difference < 0:
                more, less, low, high = less, more, -high, -low
            verb = "learns" if metric.role == "learning" else "forgets"
            size = f"{metric.show(abs(self.difference))} {metric.unit}"
            return (
                f"{scope}{more} {verb} more than {less} on {metric.subject}: {size}"
                f" {metric.show_limits(low, high)}."
            )
        limits = metric.show_limits(low, high, signed=True)
        if not self.interval.includes_zero:  # the p-value is the reason
            limits += f", p = {self.adjusted_p:.2f} after Holm's correction"
        return f"{scope}{not_distinguishable} {limits}; {needs(self)}."


def summarise(label: str, runs: Sequence[Run], metric: Metric) -> Summary:
    """Summarise one metric over runs of one method and learning rate, one run per seed."""
    values = {run.seed: final_value(run, metric) for run in runs}
    items = item_matrix([runs], metric)
    interval = two_level = None
    if items:
        matrix, weights = items[0][0], items[1]
        if len(runs) >= MIN_SEEDS:
            interval = seeds_and_items(matrix, weights)
        else:
            interval = bootstrap_items(matrix.mean(0), weights)
        two_level = two_level_bootstrap(matrix, weights) if len(runs) > 1 else None
    elif len(runs) >= MIN_SEEDS:
        interval = over_seeds(list(values.values()))
    num_items = len(items[1]) if items else None
    mean = float(np.mean(list(values.values())))
    return Summary(label, metric, values, mean, interval, num_items, two_level)


def compare_pairs(chosen: Mapping[str, Sequence[Run]], metric: Metric) -> list[PairwiseComparison]:
    """Compare every two methods, with p-values adjusted over the pairs."""
    names = list(combinations(chosen, 2))
    pairs = [
        compare_pair(first, chosen[first], second, chosen[second], metric, num_tests=len(names))
        for first, second in names
    ]
    adjusted = holm([pair.p for pair in pairs])
    mcnemar_adjusted = holm([pair.mcnemar.p if pair.mcnemar else None for pair in pairs])
    return [
        replace(pair, adjusted_p=p, adjusted_mcnemar=mcnemar_p)
        for pair, p, mcnemar_p in zip(pairs, adjusted, mcnemar_adjusted, strict=True)
    ]


def compare_pair(
    first: str,
    first_runs: Sequence[Run],
    second: str,
    second_runs: Sequence[Run],
    metric: Metric,
    *,
    num_tests: int = 1,
) -> PairwiseComparison:
    """Compare two methods in one metric, paired where they share seeds.

    Args:
        first: name of the first method.
        first_runs: its runs at its chosen learning rate, one per seed.
        second: name of the second method.
        second_runs: its runs at its chosen learning rate, one per seed.
        metric: what to compare.
        num_tests: pairs compared, which share the 5 % in the needed numbers.
    """
    ours, theirs, paired = _matched_runs(first_runs, second_runs)
    values = [np.array([final_value(run, metric) for run in runs]) for runs in (ours, theirs)]
    difference = float(values[0].mean() - values[1].mean())
    items = item_matrix([ours, theirs], metric)
    test = _mcnemar(ours[0], theirs[0], metric)
    alpha = ALPHA / num_tests
    seeds_needed, items_needed, both = seeds_and_items_needed(
        difference, values, items, paired, alpha
    )
    if test and items and len(ours) == len(theirs) == 1:
        items_needed = mcnemar_items_needed(
            test.only_first, test.only_second, test.num_items, alpha
        )
    return PairwiseComparison(
        metric=metric,
        first=first,
        second=second,
        difference=difference,
        interval=interval_of_difference(values, items, paired=paired),
        adjusted_p=None,
        seeds=(tuple(run.seed for run in ours), tuple(run.seed for run in theirs)),
        num_items=len(items[1]) if items else None,
        mcnemar=test,
        mcnemar_seeds=(ours[0].seed, theirs[0].seed) if test else None,
        adjusted_mcnemar=None,
        seeds_needed=seeds_needed,
        items_needed=items_needed,
        both_needed=both,
        num_tests=num_tests,
    )


def interval_of_difference(
    values: Sequence[np.ndarray],
    items: tuple[Sequence[np.ndarray], np.ndarray] | None,
    *,
    paired: bool,
) -> Interval | None:
    """Return the interval of first minus second; None if nothing shows the spread.

    Args:
        values: the seeds' values of both, [S1] and [S2].
        items: the values of the items, [S1, I] and [S2, I], and their weights [I]; None without
            items.
        paired: whether both have the same seeds, in the same order.
    """
    (first, second), weights = items or ([ends[:, None] for ends in values], np.ones(1))
    if min(len(first), len(second)) < MIN_SEEDS:
        return bootstrap_items(first.mean(0) - second.mean(0), weights) if items else None
    if paired:
        return seeds_and_items(first - second, weights)
    return unpaired_seeds_and_items(first, second, weights)


def _matched_runs(first: Sequence[Run], second: Sequence[Run]) -> tuple[list[Run], list[Run], bool]:
    """Return the runs to compare of each method, by seed, and whether they are paired.

    Shared seeds are paired. If too few are shared but both methods have enough seeds, all are used
    unpaired.
    """
    ours = {run.seed: run for run in first}
    theirs = {run.seed: run for run in second}
    shared = sorted(set(ours) & set(theirs))
    both_enough = min(len(ours), len(theirs)) >= MIN_SEEDS
    if len(shared) >= MIN_SEEDS or (shared and not both_enough):
        return [ours[seed] for seed in shared], [theirs[seed] for seed in shared], True
    return [ours[seed] for seed in sorted(ours)], [theirs[seed] for seed in sorted(theirs)], False


def _mcnemar(first: Run, second: Run, metric: Metric) -> McNemar | None:
    if not metric.is_binary:
        return None
    ours, theirs = outcomes(first, metric), outcomes(second, metric)
    names = sorted(set(ours) & set(theirs))
    if not names or len(names) != len(ours) or len(names) != len(theirs):
        return None
    return mcnemar(
        np.array([ours[name] for name in names]), np.array([theirs[name] for name in names])
    )


def needs(pair: PairwiseComparison) -> str:
    """Return how many seeds or items the observed difference would need."""
    ways = []
    if pair.seeds_needed is not None:
        ways.append(f"{pair.seeds_needed:,} seeds on these items")
    if pair.items_needed is not None:
        ways.append(f"{pair.items_needed:,} items with these seeds")
    if pair.both_needed is not None:
        seeds, items = pair.both_needed
        ways.append(f"{seeds:,} seeds together with {items:,} items")
    if ways:
        tests = f" over {pair.num_tests} pairs" if pair.num_tests > 1 else ""
        return (
            f"a difference this large needs {' or '.join(ways)} (80 % power, two-sided 5 %{tests})"
        )
    return "no number of items or seeds would show a difference this small"
