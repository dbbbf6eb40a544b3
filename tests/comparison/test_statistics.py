"""Intervals and tests against scipy, and against simulations with a known truth."""

import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.stats

from foundry_ext.comparison.power import both_needed, left_for, mcnemar_items_needed, pairs_needed
from foundry_ext.comparison.statistics import (
    bootstrap_items,
    holm,
    influences,
    mcnemar,
    over_seeds,
    seeds_and_items,
    two_level_bootstrap,
    unpaired_seeds_and_items,
)
from tests.tiers import one_of


def within_binomial_error(hits: int, trials: int, share: float) -> bool:
    """Return whether `hits` fits a true `share`, within 3.3 standard deviations (p = 0.001)."""
    return abs(hits / trials - share) <= 3.3 * math.sqrt(share * (1 - share) / trials)


def test_bca_and_percentile_are_scipys():
    values = np.random.default_rng(3).exponential(size=80)
    ones = np.ones(80)
    for corrected, method in ((True, "BCa"), (False, "percentile")):
        ours = bootstrap_items(values, ones, corrected=corrected, resamples=20_000)
        theirs = scipy.stats.bootstrap(
            (values,), np.mean, method=method, n_resamples=20_000, rng=np.random.default_rng(1)
        )
        interval = theirs.confidence_interval
        # Both are random: limits of 20,000 resamples wander by about 0.02 standard errors.
        assert ours.low == pytest.approx(interval.low, abs=0.06 * theirs.standard_error)
        assert ours.high == pytest.approx(interval.high, abs=0.06 * theirs.standard_error)
        assert ours.standard_error == pytest.approx(theirs.standard_error, rel=0.03)
    assert bootstrap_items(values, ones).low != bootstrap_items(values, ones, corrected=False).low


def test_bca_of_a_ratio_is_scipys():
    rng = np.random.default_rng(4)
    weights = rng.integers(5, 60, size=90).astype(float)
    values = weights * rng.normal(1.0, 0.5, size=90)
    ours = bootstrap_items(values, weights, resamples=20_000)
    theirs = scipy.stats.bootstrap(
        (values, weights),
        lambda v, w, axis: v.sum(axis) / w.sum(axis),
        paired=True,
        n_resamples=20_000,
        rng=np.random.default_rng(1),
    )
    interval = theirs.confidence_interval
    assert ours.estimate == pytest.approx(values.sum() / weights.sum())
    assert (ours.low, ours.high) == pytest.approx(
        (interval.low, interval.high), abs=0.06 * theirs.standard_error
    )
    assert np.mean(influences(values, weights)) == pytest.approx(ours.estimate)
    error = influences(values, weights).std(ddof=1) / math.sqrt(90)
    assert error == pytest.approx(theirs.standard_error, rel=0.05)


def test_seeds_alone_give_the_t_interval():
    means = [1.0, 1.4, 0.9, 1.6]
    ours = over_seeds(means)
    theirs = scipy.stats.ttest_1samp(means, 0)
    low, high = theirs.confidence_interval()
    assert (ours.low, ours.high, ours.p) == pytest.approx((low, high, theirs.pvalue), abs=1e-6)
    assert ours.kind == "seeds"


def test_two_groups_of_seeds_are_independent():
    first, second = np.array([[1.0], [1.4], [0.9]]), np.array([[0.2], [0.1], [0.4], [0.3]])
    ours = unpaired_seeds_and_items(first, second, np.ones(1))
    error = math.sqrt(first.var(ddof=1) / 3 + second.var(ddof=1) / 4)
    assert ours.estimate == pytest.approx(first.mean() - second.mean())
    assert ours.standard_error == pytest.approx(error)
    # At least as wide as Welch's, which is known to be a little narrow for groups this small.
    welch = scipy.stats.ttest_ind(first[:, 0], second[:, 0], equal_var=False)
    assert ours.low <= welch.confidence_interval().low


def test_items_alone_decide_where_seeds_agree():
    rng = np.random.default_rng(5)
    items = rng.normal(0.3, 1, size=200)
    ours = seeds_and_items(np.stack([items] * 3), np.ones(200))
    theirs = scipy.stats.ttest_1samp(items, 0).confidence_interval()
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_p_value_and_interval_agree():
    rng = np.random.default_rng(6)
    for shift in np.linspace(0, 0.6, 25):
        values = shift + rng.normal(size=(3, 1)) * 0.1 + rng.normal(size=(3, 50))
        interval = seeds_and_items(values, np.ones(50))
        assert interval.includes_zero == (interval.p >= 0.05)


@pytest.mark.parametrize(
    ("b", "c", "p"),
    [
        *((0, 0, 1), (0, 5, 2 / 2**5), (6, 0, 2 / 2**6), (10, 10, 1), (3, 12, 2 * 576 / 2**15)),
        (40, 65, 2 * sum(math.comb(105, heads) for heads in range(41)) / 2**105),
    ],
)
def test_mcnemar_by_hand(b: int, c: int, p: float):
    """p is twice a fair coin's tail: of 15 tosses, 1 + 15 + 105 + 455 ways give at most 3."""
    first = np.array([1] * b + [0] * c + [1] * 20 + [0] * 7)
    second = np.array([0] * b + [1] * c + [1] * 20 + [0] * 7)
    ours = mcnemar(first, second)
    assert (ours.only_first, ours.only_second, ours.num_items) == (b, c, b + c + 27)
    assert ours.p == pytest.approx(p)


def test_mcnemar_refuses_shares():
    with pytest.raises(ValueError, match="0 and 1"):
        mcnemar(np.array([0.5, 1]), np.array([1, 0]))


def test_holm_by_hand():
    # 0.01 * 4, then the running maximum of 0.02 * 3, 0.03 * 2 and 0.6 * 1
    assert holm([0.02, 0.01, 0.6, 0.03]) == pytest.approx([0.06, 0.04, 0.6, 0.06])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_copies_of_a_run_differ_by_nothing():
    same = seeds_and_items(np.zeros((3, 10)), np.ones(10))
    assert (same.estimate, same.low, same.high, same.p) == (0, 0, 0, 1)
    rounding = bootstrap_items(np.full(10, 1e-17), np.ones(10))
    assert rounding.p == 1


@pytest.mark.parametrize("bad", [[1.0, np.nan], [1.0, np.inf]])
def test_values_that_are_no_numbers_are_refused(bad: list[float]):
    with pytest.raises(ValueError, match="finite"):
        bootstrap_items(np.array(bad), np.ones(2))


# --- simulations ---------------------------------------------------------------------------------


def crossed(rng: np.random.Generator, seeds: int, items: int, sizes) -> np.ndarray:
    """Return [S, I] differences with true mean 0, from the seed, the item, and the rest."""
    of_seed, of_item, rest = sizes
    return (
        of_seed * rng.normal(size=(seeds, 1))
        + of_item * rng.normal(size=(1, items))
        + rest * rng.normal(size=(seeds, items))
    )


# Spread of seeds, of items, and the rest: seeds decide, both do, items do, nothing but noise.
SHARES = [(0.5, 1.0, 0.5), (0.15, 1.0, 0.5), (0.0, 1.0, 0.3), (0.05, 0.0, 1.0)]


@pytest.mark.parametrize("trials", one_of([80, 250], 80))
@pytest.mark.parametrize("sizes", SHARES)
def test_interval_over_three_seeds_and_items_covers(sizes, trials):
    rng = np.random.default_rng(11)
    covered = found = 0
    for trial in range(trials):
        values = crossed(rng, 3, 60, sizes)
        interval = seeds_and_items(values, np.ones(60), seed=trial)
        covered += interval.includes_zero
        found += interval.p < 0.05
    assert covered / trials >= 0.95 or within_binomial_error(covered, trials, 0.95)
    assert found == trials - covered


def test_bootstrap_over_three_seeds_covers_far_too_little():
    """None is reported, because resamples of three numbers show no spread beyond the three."""
    rng = np.random.default_rng(12)
    trials, plain, t = 600, 0, 0
    for trial in range(trials):
        means = rng.normal(size=3)
        plain += bootstrap_items(
            means, np.ones(3), corrected=False, resamples=500, seed=trial
        ).includes_zero
        t += over_seeds(means).includes_zero
    assert plain / trials < 0.8
    assert within_binomial_error(t, trials, 0.95)


def test_two_level_bootstrap_covers_too_little_where_seeds_decide():
    rng = np.random.default_rng(13)
    trials, covered = 200, 0
    for trial in range(trials):
        low, high = two_level_bootstrap(
            crossed(rng, 3, 60, SHARES[0]), np.ones(60), resamples=600, seed=trial
        )
        covered += low <= 0 <= high
    assert covered / trials < 0.9


def test_interval_over_items_covers_skewed_ratios():
    rng = np.random.default_rng(14)
    trials, covered = 500, 0
    for trial in range(trials):
        weights = rng.integers(10, 60, size=150).astype(float)
        values = weights * (rng.exponential(size=150) - 1)
        interval = bootstrap_items(values, weights, resamples=1500, seed=trial)
        covered += interval.includes_zero
    # BCa is second-order accurate, not exact: 150 skewed items cost about a point.
    assert abs(covered / trials - 0.945) <= 3.3 * math.sqrt(0.95 * 0.05 / trials)


def test_mcnemar_finds_nothing_too_often_where_there_is_nothing():
    rng = np.random.default_rng(15)
    trials, found = 2000, 0
    for _ in range(trials):
        ease = rng.random(300)
        first, second = (rng.random(300) < ease for _ in range(2))
        found += mcnemar(first.astype(int), second.astype(int)).p < 0.05
    share = found / trials
    assert 0.02 < share < 0.05 + 3.3 * math.sqrt(0.05 * 0.95 / trials)  # exact, so below 5 %


def test_holm_keeps_the_error_of_a_family():
    """Among six pairs of four equal methods, at most 5 % of families have a false finding."""
    rng = np.random.default_rng(16)
    families, wrong, wrong_plain = 800, 0, 0
    for _ in range(families):
        methods = rng.normal(size=(4, 30))
        pairs = np.stack([methods[i] - methods[j] for i in range(4) for j in range(i)])
        p_values = scipy.stats.ttest_1samp(pairs, 0, axis=1).pvalue.tolist()
        wrong += min(holm(p_values)) < 0.05
        wrong_plain += min(p_values) < 0.05
    assert wrong / families <= 0.05 + 3.3 * math.sqrt(0.05 * 0.95 / families)
    assert wrong_plain / families > 0.12


# --- power ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("difference", "deviation"), [(1.0, 1.0), (0.5, 1.3), (-0.1, 1.0)])
def test_pairs_needed_have_the_power_of_the_noncentral_t(difference: float, deviation: float):
    def power(n: int) -> float:
        df, shift = n - 1, abs(difference) / deviation * math.sqrt(n)
        critical = scipy.stats.t.ppf(0.975, df)
        return scipy.stats.nct.sf(critical, df, shift) + scipy.stats.nct.cdf(-critical, df, shift)

    n = pairs_needed(difference, deviation)
    assert n is not None
    assert power(n) == pytest.approx(0.8, abs=0.03)
    assert power(n + 1) > 0.8


def test_pairs_needed_at_the_ends():
    assert pairs_needed(0.0, 1.0) is None
    assert pairs_needed(1e-9, 1.0) is None
    assert pairs_needed(1.0, 0.0) == 2
    needed = [pairs_needed(d, 1.0) for d in (2.0, 1.0, 0.5, 0.25)]
    assert all(a < b for a, b in pairwise(needed))  # type: ignore[operator]


def test_mcnemar_items_needed_have_the_power():
    rng = np.random.default_rng(17)
    only_first, only_second, num = 30, 12, 200
    needed = mcnemar_items_needed(only_first, only_second, num)
    assert needed is not None
    shares = [only_first / num, only_second / num]
    trials, found = 1500, 0
    for _ in range(trials):
        drawn = rng.random(needed)
        first = (drawn < shares[0]).astype(int)
        second = ((drawn >= shares[0]) & (drawn < sum(shares))).astype(int)
        found += mcnemar(first, second).p < 0.05
    assert found / trials == pytest.approx(0.78, abs=0.045)  # exact tests give a little away
    assert mcnemar_items_needed(5, 5, 100) is None


def test_what_one_error_hides_the_other_cannot_find():
    assert left_for(0.1, 1.0, 100) == 0.0
    assert left_for(1.0, 0.0, 100) == 1.0
    assert 0 < left_for(1.0, 0.2, 100) < 1


def test_seeds_and_items_needed_together():
    """More seeds or more items alone do not find 0.2, but both together do."""
    found = both_needed(0.2, 0.3, 1.0, 3, 50)
    assert found is not None
    rng = np.random.default_rng(18)
    trials, seen = 120, 0
    for trial in range(trials):
        values = 0.2 + crossed(rng, *found, (0.3, 1.0, 0.0))
        seen += seeds_and_items(values, np.ones(found[1]), seed=trial).p < 0.05
    assert seen / trials == pytest.approx(0.85, abs=0.13)
    assert both_needed(0.0, 0.3, 1.0, 3, 50) is None
