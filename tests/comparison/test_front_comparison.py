"""Methods compared by their whole fronts: what is claimed, and what is not."""

from collections.abc import Sequence

import numpy as np
import pytest

from foundry_ext.comparison.comparison import compare_runs
from foundry_ext.comparison.front_comparison import FrontComparison, compare_fronts
from foundry_ext.comparison.fronts import SeedPoints, matching_levels
from foundry_ext.comparison.runs import Loaded, load_runs
from foundry_ext.comparison.tradeoff import Point
from foundry_ext.utils.errors import UserError
from tests.comparison import records


def method(
    learning: Sequence[float],
    forgetting: Sequence[float],
    seeds: Sequence[int] = (1, 2, 3),
    noise: float = 0.01,
    draw: int = 0,
) -> SeedPoints:
    """Return points around true means, without items."""
    rng = np.random.default_rng(draw)
    shape = (len(seeds), len(learning))
    ends = [means + noise * rng.normal(size=shape) for means in (learning, forgetting)]
    return SeedPoints(tuple(map(float, range(len(learning)))), tuple(seeds), *ends)


def compare(methods: dict[str, SeedPoints], reference: float | None = None) -> FrontComparison:
    means = {
        label: [
            Point(label, rate, float(x), float(y), each.seeds)
            for rate, x, y in zip(
                each.rates, each.learning.mean(0), each.forgetting.mean(0), strict=True
            )
        ]
        for label, each in methods.items()
        if each.seeds
    }
    return compare_fronts(methods, means, reference)


def test_a_better_front_is_found_and_an_equal_one_is_not():
    good, bad = ((1, 2, 3), (0.5, 1, 2)), ((0.8, 1.7, 2.6), (0.5, 1, 2))
    found = compare({"A": method(*good), "B": method(*bad, draw=1), "C": method(*bad, draw=2)})
    assert found.reference in (2.2, 2.3) and not found.is_given  # 1.1 * 2 and a little noise
    expected = 1 * 0.5 + 2 * 1 + 3 * (found.reference - 2)
    assert found.areas["A"].mean == pytest.approx(expected, abs=0.05)
    by_name = {(pair.first, pair.second): pair for pair in found.area_pairs}
    assert by_name["A", "B"].is_distinguishable and by_name["A", "B"].difference > 0
    assert by_name["A", "B"].in_general and by_name["A", "B"].seeds == ((1, 2, 3), (1, 2, 3))
    assert not by_name["B", "C"].is_distinguishable
    (a_b, _, b_c) = found.level_pairs
    assert a_b.is_distinguishable and a_b.difference < 0 and not b_c.is_distinguishable


def test_holm_counts_the_pairs():
    methods = {label: method((1, 2), (1, 2), draw=index) for index, label in enumerate("ABCD")}
    found = compare(methods)
    assert len(found.area_pairs) == 6
    for pairs in (found.area_pairs, found.level_pairs):
        least = min(pairs, key=lambda pair: pair.p or 1)
        assert least.p is not None
        assert least.adjusted_p == pytest.approx(min(1, len(pairs) * least.p))


def test_a_copy_differs_by_nothing():
    once = method((1, 2), (1, 2))
    found = compare({"A": once, "B": once})
    for pair in (*found.area_pairs, *found.level_pairs):
        assert pair.difference == 0 and pair.p == 1 and not pair.is_distinguishable


def test_the_reference_decides_the_same_for_all_and_may_be_given():
    methods = {"A": method((1, 2), (0.5, 1)), "B": method((1, 2), (0.5, 1), draw=1)}
    given = compare(methods, 2.0)
    assert given.reference == 2.0 and given.is_given
    assert given.areas["A"].mean == pytest.approx(0.5 + 2, abs=0.1)
    # Nothing beyond the reference counts.
    assert compare(methods, 0.75).areas["A"].mean == pytest.approx(0.25, abs=0.05)
    with pytest.raises(UserError, match="reference -1: must be a level of forgetting above 0"):
        compare_runs(Loaded(), reference=-1)


def test_unequal_numbers_of_rates_are_not_compared():
    found = compare({"A": method((1, 2, 3), (1, 2, 3)), "B": method((1, 2), (1, 2))})
    assert found.not_compared == [("A", "B", "3 and 2 learning rates were run")]
    assert found.area_pairs == [] and set(found.areas) == {"A", "B"}


def test_a_method_without_a_whole_front_is_named():
    found = compare({"A": method((1, 2), (1, 2)), "B": method((1, 2), (1, 2), seeds=())})
    ((first, second, reason),) = found.not_compared
    assert (first, second) == ("A", "B") and "no seed of B" in reason
    assert set(found.areas) == {"A"} and found.levels == {} and found.level_pairs == []


def test_budgets_that_only_one_grid_covers_decide_nothing():
    """B is A at higher rates: its grid alone makes its area smaller."""
    found = compare({"A": method((1, 2), (1, 2)), "B": method((2, 3), (2, 3), draw=1)})
    (pair,) = found.area_pairs
    assert pair.interval is not None and not pair.interval.includes_zero
    assert pair.covered_from == pytest.approx(2, abs=0.05)
    assert pair.covered is not None and pair.covered.estimate < 0
    assert not pair.is_distinguishable
    beyond = compare({"A": method((1, 2), (1, 2)), "B": method((2, 3), (2, 3), draw=1)}, 1.5)
    assert beyond.area_pairs[0].covered is None and not beyond.area_pairs[0].is_distinguishable


def test_a_lead_at_small_budgets_alone_ranks_nothing():
    """From 2 on, both learned the same, so only the budgets below, without a point of B, differ."""
    found = compare({"A": method((1, 3), (1, 2)), "B": method((3, 3), (2, 2.1), draw=1)})
    (pair,) = found.area_pairs
    assert pair.interval is not None and not pair.interval.includes_zero
    assert pair.covered is not None and pair.covered.includes_zero
    assert pair.adjusted_p is not None and pair.adjusted_p > 0.05
    assert not pair.is_distinguishable


def test_one_rate_each_makes_fronts_of_one_point():
    better = compare({"A": method((3,), (1,)), "B": method((2,), (1.5,), draw=1)})
    assert better.area_pairs[0].is_distinguishable and better.area_pairs[0].difference > 0
    assert better.levels == {}
    trade = compare({"A": method((3,), (2,)), "B": method((2,), (1,), draw=1)})
    assert not trade.area_pairs[0].is_distinguishable


def test_an_upper_bound_can_only_be_the_lower_one():
    """B learned more than A all along its front."""
    cheap, dear = method((4, 5), (0.3, 1), draw=1), method((4, 5), (3, 4), draw=1)
    reach = method((1, 2), (0.5, 1))
    for other, is_found in ((cheap, True), (dear, False)):
        found = compare({"A": reach, "B": other})
        (pair,) = found.level_pairs
        assert found.tested_level is not None
        assert found.levels[found.tested_level]["B"].num_bounds == 3
        assert pair.bound == "second" and pair.is_distinguishable == is_found
        assert pair.interval is not None and not pair.interval.includes_zero
        turned = compare({"B": other, "A": reach}).level_pairs[0]
        assert turned.bound == "first" and turned.is_distinguishable == is_found
    # Of two methods that both learned more, nothing is known.
    three = compare({"A": reach, "B": cheap, "C": dear})
    assert [(pair.first, pair.second) for pair in three.level_pairs] == [("A", "B"), ("A", "C")]


def test_levels_lie_on_the_fronts_that_reach_them():
    methods = {
        "A": method((1, 3), (1, 2)),
        "B": method((2, 5), (1, 2)),
        "C": method((9, 9.5), (1, 2)),
    }
    low, middle, high = matching_levels(methods)
    assert 2 < low < middle < high < 3.05
    assert middle == pytest.approx(2.5, abs=0.03)
    assert matching_levels({"A": methods["A"], "C": method((-2, -1), (1, 2))}) == []
    assert matching_levels({"A": methods["A"]}) == []


def test_a_method_that_learned_nothing_has_no_interval_and_no_level():
    learner, idle = method((1, 3), (1, 2)), method((0, 0), (0.5, 1), draw=5)
    found = compare({"A": learner, "B": idle})
    assert found.at_floor == ["B"] and found.levels == {}
    assert found.areas["B"].interval is None and found.areas["A"].interval is not None
    assert found.area_pairs[0].is_distinguishable
    assert compare({"A": learner, "C": method((1.5, 2), (1, 2), draw=1)}).at_floor == []


def test_one_seed_speaks_of_its_run_alone(tmp_path):
    for rate in (5e-4, 1e-3, 2e-3):
        records.write_run(tmp_path, "full", rate, 17, num_items=40)
        records.write_run(tmp_path, "lora", 10 * rate, 17, num_items=40)
    found = compare_runs(load_runs([str(tmp_path)])).fronts
    (pair,) = found.area_pairs
    assert pair.interval is not None and pair.interval.kind == "items" and not pair.in_general
