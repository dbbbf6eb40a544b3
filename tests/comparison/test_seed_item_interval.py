"""The interval over seeds and items: its ends against scipy, and its coverage."""

import math

import numpy as np
import pytest
import scipy.stats

from foundry_ext.comparison.interval import interval_from_parts
from foundry_ext.comparison.seed_item_interval import (
    Sample,
    half_width,
    interval_of_difference,
    interval_of_mean,
    matched_samples,
)

NO_ITEMS = None, 0


def crossed(rng: np.random.Generator, seeds: int, sizes, items: int = 60, draws: int = 200):
    """Return a sample of means over items with true mean 0, and its bootstrap over items."""
    of_seed, of_item, rest = sizes
    values = (
        of_seed * rng.normal(size=(seeds, 1))
        + of_item * rng.normal(size=(1, items))
        + rest * rng.normal(size=(seeds, items))
    )
    counts = rng.multinomial(items, np.full(items, 1 / items), size=draws)
    return Sample(dict(enumerate(values.mean(1))), counts @ values.T / items, items)


def test_seeds_alone_give_the_t_interval():
    values = {1: 1.0, 2: 1.4, 5: 0.9, 7: 1.6}
    ours = interval_of_mean(Sample(values, *NO_ITEMS))
    theirs = scipy.stats.ttest_1samp(list(values.values()), 0)
    assert ours is not None and ours.kind == "seeds"
    assert (ours.low, ours.high, ours.p) == pytest.approx(
        (*theirs.confidence_interval(), theirs.pvalue), abs=1e-9
    )


def test_few_seeds_vary_the_items_alone_and_then_nothing():
    rng = np.random.default_rng(1)
    sample = crossed(rng, 2, (0.0, 1.0, 0.3), items=200, draws=4000)
    ours = interval_of_mean(sample)
    assert ours is not None and ours.kind == "items"
    assert sample.replicates is not None
    error = sample.replicates.mean(1).std(ddof=1)
    assert ours.high - ours.estimate == pytest.approx(scipy.stats.t.isf(0.025, 199) * error)
    assert interval_of_mean(Sample({1: 1.0, 2: 2.0}, *NO_ITEMS)) is None


def test_the_noise_of_each_seed_on_items_counts_once():
    """With no item effect that seeds share, seeds alone show all the spread."""
    rng = np.random.default_rng(2)
    shares = []
    for _ in range(60):
        sample = crossed(rng, 5, (0.0, 0.0, 1.0))
        ours = interval_of_mean(sample)
        alone = interval_of_mean(Sample(sample.values, *NO_ITEMS))
        assert ours is not None and alone is not None
        shares.append((ours.standard_error / alone.standard_error) ** 2)
    assert np.median(shares) < 1.2  # 1.9 if it counted twice


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.9])
def test_it_covers_whatever_the_shares_of_seeds_and_items(seeds: int, share: float):
    """The docstring's figures: with a known variance of items, from 94.5 to 96.9 %."""
    df, num = seeds - 1, 400
    drawn = share * scipy.stats.chi2.ppf((np.arange(num) + 0.5) / num, df) / df
    halves = [
        interval_from_parts(0.1, [(v, df), (1 - share, 1e9)], "", half_width).high - 0.1
        for v in drawn
    ]
    coverage = float(np.mean(1 - 2 * scipy.stats.norm.sf(halves)))
    assert 0.943 < coverage < 0.970


def test_p_value_and_interval_agree():
    for estimate in np.linspace(-5, 5, 40):
        ours = interval_from_parts(estimate, [(0.4, 2), (0.6, 99)], "", half_width)
        assert ours.includes_zero == (ours.p >= 0.05)
    assert interval_from_parts(1e9, [(1.0, 2)], "", half_width).p < 1e-9
    assert interval_from_parts(0.0, [(1.0, 2)], "", half_width).p == pytest.approx(1)
    copies = interval_from_parts(0.0, [(0.0, 2), (0.0, 99)], "", half_width)
    assert (copies.low, copies.high, copies.p) == (0, 0, 1)


def test_shared_seeds_are_paired_and_their_common_part_cancels():
    rng = np.random.default_rng(3)
    first = crossed(rng, 4, (1.0, 1.0, 0.1))
    assert first.replicates is not None
    moved = Sample({s: v + 0.5 for s, v in first.values.items()}, first.replicates + 0.5, 60)
    ours, theirs, paired = matched_samples(moved, first)
    found = interval_of_difference(ours, theirs, paired=paired)
    assert paired and found is not None
    assert (found.low, found.high) == pytest.approx((0.5, 0.5))
    other = Sample({s + 2: v for s, v in first.values.items()}, first.replicates, 60)
    ours, theirs, paired = matched_samples(moved, other)
    assert not paired and list(theirs.values) == [2, 3, 4, 5]
    apart = interval_of_difference(ours, theirs, paired=paired)
    assert apart is not None and apart.high - apart.low > 1
    few = Sample({3: 1.0}, np.ones((200, 1)), 60)
    ours, theirs, paired = matched_samples(moved, few)
    assert paired and list(ours.values) == [3]


def test_unpaired_seeds_are_a_little_wider_than_welch():
    first, second = {1: 1.0, 2: 1.4, 3: 0.9}, {4: 0.2, 5: 0.1, 6: 0.4, 7: 0.3}
    ours = interval_of_difference(Sample(first, *NO_ITEMS), Sample(second, *NO_ITEMS), paired=False)
    values = [list(each.values()) for each in (first, second)]
    theirs = scipy.stats.ttest_ind(*values, equal_var=False).confidence_interval()
    assert ours is not None
    assert ours.low < theirs.low and ours.high > theirs.high
    assert math.isclose(ours.estimate, np.mean(values[0]) - np.mean(values[1]))
