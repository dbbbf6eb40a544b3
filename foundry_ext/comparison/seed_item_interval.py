"""Interval of a mean over seeds of any function of the items, such as the area of a front.

S is the number of seeds, B of bootstrap samples of the items. A statistic is computed per seed
from all items, giving `values` [S], and again from each bootstrap sample, giving `replicates`
[B, S]. Its mean over seeds varies because of

- the seeds: v_seeds = var(values) / S, with S - 1 degrees of freedom. It holds the seeds' own
  spread and the part of the items' noise that is each seed's own.
- the items: v_items = var(mean over seeds of the replicates). It holds what the items do to all
  seeds alike and, again, the part that is each seed's own. That part, the mean over replicates of
  var(replicates - values) / S, is subtracted, so that it counts once.

The half-width is a weighted mean of two: 3/5 of the square root of the sum of (t_df standard
error)^2 over the parts (MOVER, Zou and Donner 2008), and 2/5 of t_df times the root of the summed
variance, with Satterthwaite's degrees of freedom. With three seeds and known item variance, the
first alone covers 95.0 to 97.6 % and the second alone 92.2 to 95.0 %, depending on the shares of
seeds and items; together they cover 94.5 to 96.9 % (numerical integration), and with five seeds
94.9 to 96.0 %. `python -m experiments.simulations.fronts` measures the coverage on fronts.

`statistics.seeds_and_items` is the interval of plain means. It counts the seeds' own noise twice
and covers up to 99 %.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from foundry_ext.comparison.interval import Interval, Part, interval_from_parts, mover
from foundry_ext.comparison.statistics import MIN_SEEDS

_MOVER_SHARE = 0.6


@dataclass(frozen=True)
class Sample:
    """One statistic of one method, per seed."""

    values: Mapping[int, float]
    """seed -> the statistic from all items."""
    replicates: np.ndarray | None
    """[B, S], seeds in the order of `values`; the same bootstrap samples for all methods. None
    without items."""
    num_items: int
    """Items of the smaller of the sets that the statistic is computed from; 0 without items."""

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.values.values())))

    def of_seeds(self, seeds: Sequence[int]) -> "Sample":
        """Return the sample of these seeds alone, in this order."""
        order = list(self.values)
        columns = [order.index(seed) for seed in seeds]
        replicates = None if self.replicates is None else self.replicates[:, columns]
        return Sample({seed: self.values[seed] for seed in seeds}, replicates, self.num_items)


def interval_of_mean(sample: Sample) -> Interval | None:
    """Return the interval of the mean over seeds; None if nothing shows its spread.

    With fewer than three seeds, it is over items only and holds for these runs only.
    """
    return _interval(sample.mean, [sample])


def matched_samples(first: Sample, second: Sample) -> tuple[Sample, Sample, bool]:
    """Return both samples with the seeds to compare, and whether these are paired.

    Shared seeds are paired. If too few are shared but both have enough, all are used unpaired.
    """
    shared = sorted(first.values.keys() & second.values.keys())
    both_enough = min(len(first.values), len(second.values)) >= MIN_SEEDS
    if len(shared) >= MIN_SEEDS or (shared and not both_enough):
        return first.of_seeds(shared), second.of_seeds(shared), True
    return first, second, False


def interval_of_difference(first: Sample, second: Sample, *, paired: bool) -> Interval | None:
    """Return the interval of first minus second; None if nothing shows its spread.

    Args:
        first: one method's sample.
        second: the other's, from the same items.
        paired: whether both have the same seeds, in the same order.
    """
    difference = first.mean - second.mean
    if not paired:
        return _interval(difference, [first, second])
    values = {seed: first.values[seed] - second.values[seed] for seed in first.values}
    replicates = None
    if first.replicates is not None and second.replicates is not None:
        replicates = first.replicates - second.replicates
    num_items = min(first.num_items, second.num_items)
    return _interval(difference, [Sample(values, replicates, num_items)])


def _interval(estimate: float, samples: Sequence[Sample]) -> Interval | None:
    """Return the interval of the first sample's mean, less that of the second if there is one."""
    has_seeds = min(len(sample.values) for sample in samples) >= MIN_SEEDS
    parts: list[Part] = []
    if has_seeds:
        for sample in samples:
            values = np.array(list(sample.values.values()))
            parts.append((float(values.var(ddof=1)) / len(values), len(values) - 1))
    num_items = min(sample.num_items for sample in samples)
    if num_items > 1:
        parts.append((_item_variance(samples, each_seed_varies=has_seeds), num_items - 1))
    if not parts:
        return None
    kind = "seeds and items" if len(parts) > len(samples) else "seeds" if has_seeds else "items"
    return interval_from_parts(estimate, parts, kind, half_width)


def _item_variance(samples: Sequence[Sample], *, each_seed_varies: bool) -> float:
    """Return the variance of the estimate over items, without what varies with the seeds too."""
    means, own = [], 0.0
    for sample in samples:
        assert sample.replicates is not None, "items without replicates"
        means.append(sample.replicates.mean(1))
        if each_seed_varies:
            change = sample.replicates - np.array(list(sample.values.values()))
            own += float(change.var(axis=1, ddof=1).mean()) / len(sample.values)
    estimates = means[0] - means[1] if len(means) == 2 else means[0]
    return max(0.0, float(estimates.var(ddof=1)) - own)


def half_width(tail: float, parts: Sequence[Part]) -> float:
    """Return the weighted mean of MOVER's half-width and Satterthwaite's."""
    total = sum(variance for variance, _ in parts)
    pooled_df = total**2 / sum(variance**2 / df for variance, df in parts)
    satterthwaite = -math.sqrt(total) * float(special.stdtrit(pooled_df, tail))
    return _MOVER_SHARE * mover(tail, parts) + (1 - _MOVER_SHARE) * satterthwaite
