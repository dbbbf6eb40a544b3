"""Numbers of items or seeds that a difference needs: 80 % power at a two-sided 5 %.

`alpha` is two-sided. Several tests share the 5 % equally (Bonferroni), because Holm's correction
asks that of the first of them. A difference that Holm's correction held back therefore never needs
fewer seeds or items than there are.

These are planning figures computed from the observed difference. If that is noise, so are they.
"""

import math

import numpy as np
from scipy import stats

from foundry_ext.comparison.statistics import MIN_SEEDS, influences

POWER = 0.8
ALPHA = 0.05
MOST = 10_000_000


def _normal_quantiles(alpha: float) -> tuple[float, float]:
    return float(stats.norm.isf(alpha / 2)), float(stats.norm.ppf(POWER))


def _summed_t_quantiles(alpha: float, df: int) -> float:
    """Return t_{1 - alpha/2} + t_{power}."""
    return float(stats.t.isf(alpha / 2, df) + stats.t.ppf(POWER, df))


def pairs_needed(difference: float, deviation: float, alpha: float = ALPHA) -> int | None:
    """Return the pairs (seeds, or items) that a paired t test needs to find a mean `difference`.

    n = ((t_{1 - alpha/2} + t_{power}) deviation / difference)^2 with n - 1 degrees of freedom, and
    the smallest n that satisfies it.

    Args:
        difference: mean of the paired differences.
        deviation: standard deviation of the paired differences.
        alpha: two-sided level of the test.

    Returns:
        None if ten million are not enough.
    """
    if difference == 0:
        return None
    if deviation == 0:
        return 2
    ratio = abs(deviation / difference)
    least = (sum(_normal_quantiles(alpha)) * ratio) ** 2
    if least > MOST:
        return None
    n = max(2, math.ceil(least))  # never too many, because t quantiles exceed the normal's
    while n < (_summed_t_quantiles(alpha, n - 1) * ratio) ** 2:
        n += 1
    return n


def left_for(difference: float, fixed_error: float, df: int, alpha: float = ALPHA) -> float:
    """Return the part of a difference that more seeds must find while the items' error stays fixed.

    The same holds with seeds and items exchanged. The interval adds both half-widths in
    quadrature, so the squares subtract. The result is 0 if the fixed error alone hides the
    difference.
    """
    hidden = _summed_t_quantiles(alpha, df) * fixed_error
    return math.sqrt(max(0.0, difference**2 - hidden**2))


def both_needed(
    difference: float,
    of_seeds: float,
    of_items: float,
    num_seeds: int,
    num_items: int,
    alpha: float = ALPHA,
) -> tuple[int, int] | None:
    """Return (seeds, items), both scaled by one factor, within 5 % of the smallest that suffice.

    It is meant for differences that neither more seeds nor more items alone would show.

    Args:
        difference: observed mean difference.
        of_seeds: standard deviation over seeds.
        of_items: standard deviation over items.
        num_seeds: seeds that there are.
        num_items: items that there are.
        alpha: two-sided level of the test.
    """
    factor = 1.0
    while difference and factor * num_items <= MOST:
        seeds, items = math.ceil(factor * num_seeds), math.ceil(factor * num_items)
        left = left_for(difference, of_items / math.sqrt(items), items - 1, alpha)
        if left_for(left, of_seeds / math.sqrt(seeds), seeds - 1, alpha) > 0:
            return seeds, items
        factor *= 1.05
    return None


def seeds_and_items_needed(
    difference: float,
    values: list[np.ndarray],
    items: tuple[list[np.ndarray], np.ndarray] | None,
    paired: bool,
    alpha: float,
) -> tuple[int | None, int | None, tuple[int, int] | None]:
    """Return seeds needed with these items, items needed with these seeds, or both together.

    Args:
        difference: observed mean difference.
        values: final values of the two methods' runs, [S1] and [S2].
        items: values of the items, [S1, I] and [S2, I], and their weights [I].
        paired: whether the runs are paired by seed.
        alpha: two-sided level of the test.
    """
    num_seeds, num_items = min(map(len, values)), len(items[1]) if items else 0
    of_seeds = of_items = 0.0
    if num_seeds >= MIN_SEEDS:
        spread = [values[0] - values[1]] if paired else values
        of_seeds = float(np.sqrt(sum(samples.var(ddof=1) for samples in spread)))
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


def mcnemar_items_needed(
    only_first: int, only_second: int, num_items: int, alpha: float = ALPHA
) -> int | None:
    """Return the items that McNemar's test needs to find the observed discordance.

    n = (z_{1 - alpha/2} sqrt(psi) + z_{power} sqrt(psi - delta^2))^2 / delta^2, with psi the share
    of discordant items and delta the difference of the two shares (Connor 1987, Biometrics 43).
    """
    delta = abs(only_first - only_second) / num_items
    if delta == 0:
        return None
    psi = (only_first + only_second) / num_items
    z_alpha, z_power = _normal_quantiles(alpha)
    needed = ((z_alpha * math.sqrt(psi) + z_power * math.sqrt(psi - delta**2)) / delta) ** 2
    return math.ceil(needed) if needed <= MOST else None
