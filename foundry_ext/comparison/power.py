"""How many items or seeds a difference needs: 80 % power, two-sided 5 %.

`alpha` is two-sided. Of several tests each gets its part of the 5 % (Bonferroni), which is what
Holm's correction asks of the first of them: so a difference that it held back never needs fewer
seeds or items than there are.

Planning figures from the observed difference: where that is itself noise, so are they.
"""

import math

from foundry_ext.comparison.distributions import normal_quantile, t_quantile

POWER = 0.8
ALPHA = 0.05
MOST = 10_000_000


def pairs_needed(difference: float, deviation: float, alpha: float = ALPHA) -> int | None:
    """Pairs (seeds, or items) for a paired t test to find a mean `difference`.

    `deviation` is the standard deviation of the paired differences. None where no number up to ten
    million would do. n = ((t_{1 - alpha/2} + t_{power}) deviation / difference)^2 with n - 1
    degrees of freedom, the least n that satisfies it.
    """
    if difference == 0:
        return None
    if deviation == 0:
        return 2
    ratio = abs(deviation / difference)
    z = normal_quantile(1 - alpha / 2) + normal_quantile(POWER)
    if (z * ratio) ** 2 > MOST:
        return None

    def enough(n: int) -> bool:
        df = n - 1
        return n >= ((t_quantile(1 - alpha / 2, df) + t_quantile(POWER, df)) * ratio) ** 2

    n = max(2, math.ceil((z * ratio) ** 2))  # never too many: t quantiles are above the normal's
    while not enough(n):
        n += 1
    return n


def left_for(difference: float, fixed_error: float, df: int, alpha: float = ALPHA) -> float:
    """The part of a difference that more seeds have to find while the items' error stays as it is,
    or the other way round; 0 where that error alone hides the difference.

    The interval adds both half-widths in quadrature, so the squares subtract.
    """
    hidden = (t_quantile(1 - alpha / 2, df) + t_quantile(POWER, df)) * fixed_error
    return math.sqrt(max(0.0, difference**2 - hidden**2))


def both_needed(
    difference: float,
    of_seeds: float,
    of_items: float,
    num_seeds: int,
    num_items: int,
    alpha: float = ALPHA,
) -> tuple[int, int] | None:
    """(seeds, items), both grown by one factor, to within 5 % of the least that will do.

    For where neither alone would. `of_seeds` and `of_items` are standard deviations.
    """
    factor = 1.0
    while difference and factor * num_items <= MOST:
        seeds, items = math.ceil(factor * num_seeds), math.ceil(factor * num_items)
        left = left_for(difference, of_items / math.sqrt(items), items - 1, alpha)
        if left_for(left, of_seeds / math.sqrt(seeds), seeds - 1, alpha) > 0:
            return seeds, items
        factor *= 1.05
    return None


def mcnemar_items_needed(
    only_first: int, only_second: int, num_items: int, alpha: float = ALPHA
) -> int | None:
    """Items for McNemar's test to find the observed discordance (Connor 1987, Biometrics 43).

    n = (z_{1 - alpha/2} sqrt(psi) + z_{power} sqrt(psi - delta^2))^2 / delta^2, with psi the share
    of discordant items and delta the difference of the two shares.
    """
    delta = abs(only_first - only_second) / num_items
    if delta == 0:
        return None
    psi = (only_first + only_second) / num_items
    z_alpha, z_power = normal_quantile(1 - alpha / 2), normal_quantile(POWER)
    needed = ((z_alpha * math.sqrt(psi) + z_power * math.sqrt(psi - delta**2)) / delta) ** 2
    return math.ceil(needed) if needed <= MOST else None
