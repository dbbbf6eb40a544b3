"""What can be said: each method's interval, each pair's difference, in numbers and a sentence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from foundry_ext.comparison.measures import Measure, final_value, item_matrix, outcomes
from foundry_ext.comparison.power import (
    ALPHA,
    both_needed,
    left_for,
    mcnemar_items_needed,
    pairs_needed,
)
from foundry_ext.comparison.runs import Run
from foundry_ext.comparison.statistics import (
    MIN_SEEDS,
    Interval,
    McNemar,
    bootstrap_items,
    holm,
    influences,
    mcnemar,
    over_seeds,
    seeds_and_items,
    two_level_bootstrap,
    unpaired_seeds_and_items,
)


@dataclass(frozen=True)
class Summary:
    """A method's mean in one measure at its chosen learning rate."""

    label: str
    measure: Measure
    by_seed: Mapping[int, float]
    mean: float
    interval: Interval | None
    """None where a single seed has no items: nothing shows the spread."""
    num_items: int | None
    two_level: tuple[float, float] | None
    """Limits of the two-level bootstrap, for reference; see statistics.py."""


@dataclass(frozen=True)
class Pair:
    """First minus second in one measure."""

    measure: Measure
    first: str
    second: str
    difference: float
    interval: Interval | None
    adjusted_p: float | None
    """Holm over the pairs of this measure."""
    seeds: tuple[tuple[int, ...], tuple[int, ...]]
    """Those used of the first and of the second; equal where they are paired."""
    num_items: int | None
    mcnemar: McNemar | None
    """Of one run each, with the seeds `mcnemar_seeds`."""
    mcnemar_seeds: tuple[int, int] | None
    adjusted_mcnemar: float | None
    seeds_needed: int | None
    items_needed: int | None
    """Of the one, while the other stays as it is; None where no number of it would do."""
    both_needed: tuple[int, int] | None
    """(seeds, items), where neither alone would do."""
    num_tests: int
    """Pairs of this measure, over which the needed numbers share the 5 %."""

    @property
    def in_general(self) -> bool:
        """Whether seeds vary in the interval, so that it speaks of methods and not of runs."""
        return self.interval is not None and self.interval.kind.startswith("seeds")

    @property
    def p(self) -> float | None:
        """McNemar's where one pair of runs answers right or wrong, else the interval's."""
        if self.interval is None:
            return None
        single = len(self.seeds[0]) == len(self.seeds[1]) == 1
        return self.mcnemar.p if self.mcnemar and single else self.interval.p

    @property
    def is_distinguishable(self) -> bool:
        if self.interval is None or self.adjusted_p is None:
            return False
        return not self.interval.includes_zero and self.adjusted_p < ALPHA

    @property
    def sentence(self) -> str:
        return _sentence(self)


def summarise(label: str, runs: Sequence[Run], measure: Measure) -> Summary:
    """Of runs of one method and learning rate, one a seed."""
    values = {run.seed: final_value(run, measure) for run in runs}
    items = item_matrix([runs], measure)
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
    return Summary(label, measure, values, mean, interval, num_items, two_level)


def compare_pairs(chosen: Mapping[str, Sequence[Run]], measure: Measure) -> list[Pair]:
    """Every two methods, with p-values adjusted over the pairs."""
    every = list(combinations(chosen, 2))
    pairs = [
        compare(first, chosen[first], second, chosen[second], measure, num_tests=len(every))
        for first, second in every
    ]
    pairs = _adjusted(pairs, "p", "adjusted_p")
    return _adjusted(pairs, "mcnemar_p", "adjusted_mcnemar")


def _adjusted(pairs: list[Pair], source: str, target: str) -> list[Pair]:
    values = {}
    for index, pair in enumerate(pairs):
        p = pair.p if source == "p" else pair.mcnemar.p if pair.mcnemar else None
        if p is not None:
            values[index] = p
    adjusted = dict(zip(values, holm(list(values.values())), strict=True))
    return [
        replace(pair, **{target: adjusted[index]}) if index in adjusted else pair
        for index, pair in enumerate(pairs)
    ]


def compare(
    first: str,
    first_runs: Sequence[Run],
    second: str,
    second_runs: Sequence[Run],
    measure: Measure,
    *,
    num_tests: int = 1,
) -> Pair:
    """Runs of each method at its learning rate, one a seed; paired where seeds are shared."""
    ours, theirs, paired = _matched_runs(first_runs, second_runs)
    items = item_matrix([ours, theirs], measure)
    values = [np.array([final_value(run, measure) for run in runs]) for runs in (ours, theirs)]
    enough = min(len(ours), len(theirs)) >= MIN_SEEDS
    if items:
        (a, b), weights = items
    else:
        (a, b), weights = (values[0][:, None], values[1][:, None]), np.ones(1)
    interval = None
    if enough:
        interval = (
            seeds_and_items(a - b, weights) if paired else unpaired_seeds_and_items(a, b, weights)
        )
    elif items:
        interval = bootstrap_items(a.mean(0) - b.mean(0), weights)
    test = _mcnemar(ours[0], theirs[0], measure)
    difference = float(values[0].mean() - values[1].mean())
    alpha = ALPHA / num_tests
    seeds_needed, items_needed, both = _needed(difference, values, items, paired, alpha)
    if test and items and len(ours) == len(theirs) == 1:
        items_needed = mcnemar_items_needed(
            test.only_first, test.only_second, test.num_items, alpha
        )
    return Pair(
        measure=measure,
        first=first,
        second=second,
        difference=difference,
        interval=interval,
        adjusted_p=None,
        seeds=(tuple(run.seed for run in ours), tuple(run.seed for run in theirs)),
        num_items=len(weights) if items else None,
        mcnemar=test,
        mcnemar_seeds=(ours[0].seed, theirs[0].seed) if test else None,
        adjusted_mcnemar=None,
        seeds_needed=seeds_needed,
        items_needed=items_needed,
        both_needed=both,
        num_tests=num_tests,
    )


def _matched_runs(first: Sequence[Run], second: Sequence[Run]) -> tuple[list[Run], list[Run], bool]:
    """The runs to compare, by seed, and whether they are paired by it.

    Shared seeds are paired; where too few are shared but both methods have enough of their own,
    all are used unpaired.
    """
    ours = {run.seed: run for run in first}
    theirs = {run.seed: run for run in second}
    shared = sorted(set(ours) & set(theirs))
    both_enough = min(len(ours), len(theirs)) >= MIN_SEEDS
    if len(shared) >= MIN_SEEDS or (shared and not both_enough):
        return [ours[seed] for seed in shared], [theirs[seed] for seed in shared], True
    return [ours[seed] for seed in sorted(ours)], [theirs[seed] for seed in sorted(theirs)], False


def _needed(
    difference: float,
    values: list[np.ndarray],
    items: tuple[list[np.ndarray], np.ndarray] | None,
    paired: bool,
    alpha: float,
) -> tuple[int | None, int | None, tuple[int, int] | None]:
    """Seeds needed while the items stay as they are, and items while the seeds do; values [S]."""
    num_seeds, num_items = min(map(len, values)), len(items[1]) if items else 0
    of_seeds = of_items = 0.0
    if num_seeds >= MIN_SEEDS:
        spread = [values[0] - values[1]] if paired else values
        of_seeds = float(np.sqrt(sum(one.var(ddof=1) for one in spread)))
    if items:
        (a, b), weights = items
        of_items = float(influences(a.mean(0) - b.mean(0), weights).std(ddof=1))
    seeds_needed = items_needed = None
    if num_seeds >= MIN_SEEDS:
        left = difference
        if items:
            left = left_for(difference, of_items / np.sqrt(num_items), num_items - 1, alpha)
        seeds_needed = pairs_needed(left, of_seeds, alpha)
    if items:
        left = difference
        if num_seeds >= MIN_SEEDS:
            left = left_for(difference, of_seeds / np.sqrt(num_seeds), num_seeds - 1, alpha)
        items_needed = pairs_needed(left, of_items, alpha)
    both = None
    if num_seeds >= MIN_SEEDS and items and seeds_needed is None and items_needed is None:
        both = both_needed(difference, of_seeds, of_items, num_seeds, num_items, alpha)
    return seeds_needed, items_needed, both


def _mcnemar(first: Run, second: Run, measure: Measure) -> McNemar | None:
    if not measure.is_binary:
        return None
    ours, theirs = outcomes(first, measure), outcomes(second, measure)
    names = sorted(set(ours) & set(theirs))
    if not names or len(names) != len(ours) or len(names) != len(theirs):
        return None
    return mcnemar(
        np.array([ours[name] for name in names]), np.array([theirs[name] for name in names])
    )


def _sentence(pair: Pair) -> str:
    measure = pair.measure
    scope = "" if pair.in_general else "In these runs, "
    size = f"{measure.show(abs(pair.difference))} {measure.unit}"
    where = f"in {measure.role} on {measure.subject}"
    if pair.interval is None:
        return (
            f"{pair.first} and {pair.second} are not distinguishable {where}: difference"
            f" {measure.show(pair.difference, signed=True)} {measure.unit}, with neither items nor"
            f" {MIN_SEEDS} seeds to show its spread."
        )
    low, high = pair.interval.low, pair.interval.high
    if pair.is_distinguishable:
        more, less = (pair.first, pair.second) if pair.difference > 0 else (pair.second, pair.first)
        if pair.difference < 0:
            low, high = -high, -low
        verb = "learns" if measure.role == "learning" else "forgets"
        limits = f"[{measure.show(low)}, {measure.show(high)}]"
        return f"{scope}{more} {verb} more than {less} on {measure.subject}: {size} {limits}."
    limits = f"[{measure.show(low, signed=True)}, {measure.show(high, signed=True)}]"
    if not pair.interval.includes_zero:  # then it is the p-value that holds it back
        limits += f", p = {pair.adjusted_p:.2f} after Holm's correction"
    return (
        f"{scope}{pair.first} and {pair.second} are not distinguishable {where}: difference"
        f" {measure.show(pair.difference, signed=True)} {measure.unit} {limits}; {needs(pair)}."
    )


def needs(pair: Pair) -> str:
    """The power line: what the observed difference would need."""
    ways = []
    if pair.seeds_needed is not None:
        ways.append(f"{pair.seeds_needed:,} seeds on these items")
    if pair.items_needed is not None:
        ways.append(f"{pair.items_needed:,} items with these seeds")
    if pair.both_needed is not None:
        seeds, items = pair.both_needed
        ways.append(f"{seeds:,} seeds together with {items:,} items")
    if ways:
        found = " or ".join(ways)
        tests = f" over {pair.num_tests} pairs" if pair.num_tests > 1 else ""
        return f"a difference this large needs {found} (80 % power, two-sided 5 %{tests})"
    return "no number of items or seeds would show a difference this small"
