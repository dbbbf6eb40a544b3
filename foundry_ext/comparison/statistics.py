"""Intervals and tests of the comparison: bootstrap, seeds and items together, McNemar, Holm.

Every measure is a ratio of sums over items, so one code serves losses and accuracies:

    estimate = sum_i values_i / sum_i weights_i

For a loss, values are summed nats of a document and weights its labelled tokens; for an accuracy,
values are 0 or 1 (or a difference of two, so -1, 0 or 1) and weights are 1. S is the number of
seeds, I the number of items; `values` is [I] or [S, I], `weights` [I]. Items are shared by seeds.

Which interval when:

- fewer than three seeds: BCa bootstrap over items (Efron 1987). It speaks of these runs alone.
- three seeds or more: `seeds_and_items`, a t interval of the seeds' means and the bootstrap's error
  of the items, the two half-widths added in quadrature.
- no items: a t interval on the seeds' means.

A bootstrap over three seeds resamples only three numbers and is far too narrow, which is why none
is relied on; `two_level_bootstrap` is computed for reference. Coverage of 95 % intervals as
measured, 100 items, normal parts with the standard deviations given, 2,000 trials a line (so that
one standard error is half a point), in per cent:

    seeds   seed   item   rest | seeds_and_items   two-level   t on seeds   bootstrap of seeds
        3    0.5    1.0    0.5 |            96.7        81.8         94.8                 73.8
        3   0.15    1.0    0.5 |            97.2        92.6         89.6                 61.2
        3    0.0    1.0    0.3 |            96.2        95.2         47.9                 19.9
        3   0.05    0.0    1.0 |            99.4        99.0         94.4                 74.2
        5    0.5    1.0    0.5 |            95.4        87.9         93.4                 80.4
        5   0.15    1.0    0.5 |            97.0        93.4         81.2                 62.2
        5    0.0    1.0    0.3 |            94.4        93.8         27.6                 18.6
        5   0.05    0.0    1.0 |            99.4        99.6         95.4                 84.2

The p-value inverts the interval, so false positives are what is missing to 100. Without shared
seeds (3 and 3; 0.3, 1.0 and 0.5) it covers 99.0: careful. BCa over 150 items, 4,000 trials: 95.0
for exponential values, 94.4 for normal ones; over 80 paired items, 3,000 trials: 93.5. McNemar
under the null, 300 items, 20,000 trials: 3.9 % false positives. tests/comparison/test_statistics.py
repeats these with fewer trials.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from foundry_ext.comparison.distributions import (
    normal_cdf,
    normal_quantile,
    t_quantile,
    t_two_sided,
)

LEVEL = 0.95
RESAMPLES = 4000
MIN_SEEDS = 3
_CHUNK = 1 << 22  # resampled items held at once


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval, and the two-sided p-value of "the truth is 0"."""

    estimate: float
    low: float
    high: float
    p: float
    standard_error: float
    kind: str
    """"items", "seeds" or "seeds and items": what is taken to vary."""

    @property
    def includes_zero(self) -> bool:
        return self.low <= 0 <= self.high


def bootstrap_ratios(
    values: np.ndarray, weights: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> np.ndarray:
    """[resamples]: the ratio over items drawn with replacement."""
    values, weights = _checked(values, weights)
    rng = np.random.default_rng(seed)
    num_items = len(values)
    rows = max(1, _CHUNK // num_items)
    ratios = []
    for start in range(0, resamples, rows):
        drawn = rng.integers(num_items, size=(min(rows, resamples - start), num_items))
        ratios.append(values[drawn].sum(1) / weights[drawn].sum(1))
    return np.concatenate(ratios)


def bootstrap_items(
    values: np.ndarray,
    weights: np.ndarray,
    *,
    corrected: bool = True,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """BCa interval over items (percentile interval where not `corrected`).

    The p-value is that of a t test with the bootstrap's standard error.
    """
    values, weights = _checked(values, weights)
    estimate = float(values.sum() / weights.sum())
    ratios = bootstrap_ratios(values, weights, resamples=resamples, seed=seed)
    error = float(ratios.std(ddof=1))
    tails = np.array([(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    if corrected and error > 0 and len(values) > 2:
        tails = _bca_tails(tails, ratios, estimate, values, weights)
    low, high = np.quantile(ratios, tails)
    p = _p_value(estimate, error, max(1, len(values) - 1))
    return Interval(estimate, float(low), float(high), p, error, "items")


def _bca_tails(
    tails: np.ndarray, ratios: np.ndarray, estimate: float, values: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Efron's bias- and skewness-corrected tail probabilities; ties count half."""
    below = float(np.mean(ratios < estimate) + np.mean(ratios == estimate) / 2)
    bound = 1 / (2 * len(ratios))
    bias = normal_quantile(min(max(below, bound), 1 - bound))
    others = weights.sum() - weights
    if (others <= 0).any():  # one item holds all the weight: nothing to leave out
        return tails
    left_out = (values.sum() - values) / others
    spread = left_out.mean() - left_out
    scale = float((spread**2).sum())
    acceleration = float((spread**3).sum()) / (6 * scale**1.5) if scale > 0 else 0.0
    corrected = []
    for tail in tails:
        z = bias + normal_quantile(float(tail))
        corrected.append(normal_cdf(bias + z / (1 - acceleration * z)))
    return np.array(corrected)


def over_seeds(means: Sequence[float] | np.ndarray) -> Interval:
    """The t interval of the mean of seeds' values, [S], two or more."""
    return seeds_and_items(np.asarray(means, dtype=np.float64)[:, None], np.ones(1))


def seeds_and_items(values: np.ndarray, weights: np.ndarray, *, seed: int = 0) -> Interval:
    """The interval for new seeds and new items; values [S, I], S of two or more.

    Seeds and items are crossed: every seed is evaluated on the same items. The variance of the mean
    is var_seed/S + var_item/I + var_rest/(S I); the seeds' means show the first and the last term,
    the items' means the second and the last, so their sum counts the last twice: safe, and small.
    Each part has its own t quantile and the half-widths add in quadrature (the MOVER of Zou and
    Donner 2008); Satterthwaite's degrees of freedom were tried and cover too little at three seeds.
    With one item, seeds alone vary.
    """
    values, weights = _checked(values, weights)
    parts = [_seed_part(values, weights), _item_part(values.mean(0), weights, seed)]
    return _combined(float(values.mean(0).sum() / weights.sum()), parts, len(weights))


def unpaired_seeds_and_items(
    first: np.ndarray, second: np.ndarray, weights: np.ndarray, *, seed: int = 0
) -> Interval:
    """As `seeds_and_items` for first minus second, [S1, I] and [S2, I], which share items but no
    seeds: the variance of each one's seeds, and that of the paired items."""
    first, weights = _checked(first, weights)
    second, _ = _checked(second, weights)
    items = first.mean(0) - second.mean(0)
    parts = [_seed_part(one, weights) for one in (first, second)]
    parts.append(_item_part(items, weights, seed))
    return _combined(float(items.sum() / weights.sum()), parts, len(weights))


def _seed_part(values: np.ndarray, weights: np.ndarray) -> tuple[float, int]:
    """(squared standard error of the mean, degrees of freedom) as far as seeds vary."""
    num_seeds = len(values)
    if num_seeds < 2:
        raise ValueError(f"an interval over seeds needs at least 2 of them, not {num_seeds}")
    return float((values.sum(1) / weights.sum()).var(ddof=1)) / num_seeds, num_seeds - 1


def _item_part(values: np.ndarray, weights: np.ndarray, seed: int) -> tuple[float, int]:
    if len(weights) == 1:
        return 0.0, 1
    return float(bootstrap_ratios(values, weights, seed=seed).var(ddof=1)), len(weights) - 1


def _combined(estimate: float, parts: list[tuple[float, int]], num_items: int) -> Interval:
    """half-width^2 = sum of (t_df standard error)^2 over the parts; the p-value inverts it."""
    error = math.sqrt(sum(variance for variance, _ in parts))
    half = _half_width((1 + LEVEL) / 2, parts)
    kind = "seeds" if num_items == 1 else "seeds and items"
    if _is_rounding(error, estimate):
        p = float(_is_rounding(estimate, 1.0))
    elif len(varying := [part for part in parts if part[0] > 0]) == 1:
        p = t_two_sided(estimate / error, varying[0][1])
    else:
        low, high = 0.0, 0.5  # the one-sided tail at which the interval just touches 0
        for _ in range(20):
            tail = (low + high) / 2
            touches = _half_width(1 - tail, parts) >= abs(estimate)
            low, high = (tail, high) if touches else (low, tail)
        p = low + high
    return Interval(estimate, estimate - half, estimate + half, p, error, kind)


def _half_width(quantile: float, parts: list[tuple[float, int]]) -> float:
    if quantile <= 0.5:
        return 0.0
    return math.sqrt(sum(t_quantile(quantile, df) ** 2 * variance for variance, df in parts))


def two_level_bootstrap(
    values: np.ndarray, weights: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Percentile limits, seeds and items both resampled (Owen's "pigeonhole" bootstrap, 2007)."""
    values, weights = _checked(values, weights)
    num_seeds, num_items = values.shape
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // num_items)
    ratios = []
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        drawn = rng.integers(num_items, size=(count, num_items))
        seeds = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=count)
        sums = np.stack([row[drawn].sum(1) for row in values], 1)  # [count, S]
        ratios.append((seeds * sums).sum(1) / num_seeds / weights[drawn].sum(1))
    low, high = np.quantile(np.concatenate(ratios), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class McNemar:
    """Items that only the first, and only the second, answers right; exact two-sided p."""

    only_first: int
    only_second: int
    num_items: int
    p: float


def mcnemar(first: np.ndarray, second: np.ndarray) -> McNemar:
    """The exact test on paired outcomes of 0 and 1, [I] each: the discordant ones fall either way
    like a fair coin."""
    first, second = np.asarray(first), np.asarray(second)
    if first.shape != second.shape or not np.isin([first, second], (0, 1)).all():
        raise ValueError("McNemar's test takes two equally long rows of 0 and 1")
    only_first = int(((first == 1) & (second == 0)).sum())
    only_second = int(((first == 0) & (second == 1)).sum())
    num = only_first + only_second
    tail = sum(math.comb(num, k) for k in range(min(only_first, only_second) + 1))
    return McNemar(only_first, only_second, len(first), min(1.0, 2 * tail / 2**num))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979), in the order given."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def influences(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[I]: numbers whose mean is the ratio and whose spread / sqrt(I) is its standard error."""
    values, weights = _checked(values, weights)
    ratio = values.sum() / weights.sum()
    return ratio + (values - ratio * weights) / weights.mean()


def _p_value(estimate: float, error: float, df: float) -> float:
    if _is_rounding(error, estimate):
        return float(_is_rounding(estimate, 1.0))
    return t_two_sided(estimate / error, df)


def _is_rounding(small: float, large: float) -> bool:
    """Copies of one run differ by rounding alone: a standard error of 1e-17 is none."""
    return abs(small) <= 1e-12 * max(1.0, abs(large))


def _checked(values: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values = np.asarray(values, dtype=np.float64)
    weights = np.asarray(weights, dtype=np.float64)
    if values.shape[-1:] != weights.shape or not len(weights):
        raise ValueError(f"{values.shape} values do not fit {weights.shape} weights")
    if not (np.isfinite(values).all() and np.isfinite(weights).all() and (weights > 0).all()):
        raise ValueError("values must be finite, and weights finite and above 0")
    return values, weights
