"""Rates at which methods learn the same, on points whose rates are known."""

import math

import pytest

from foundry_ext.comparison.matched_rates import match_learning_rates
from foundry_ext.utils.errors import UserError


def points(factor: float) -> list[tuple[float, float]]:
    """Learning that rises by 0.1 nats per decade and falls at the last rate."""
    rates = [factor * 10.0**power for power in range(-6, -1)]
    learned = [0.1 * (math.log10(rate / factor) + 6) for rate in rates]
    learned[-1] = 0.05
    return [*zip(rates, learned, strict=True)]


def test_rates_are_interpolated_below_the_best():
    level, rates = match_learning_rates({"full": points(1), "lora": points(10)})
    assert level == pytest.approx(0.9 * 0.3)
    assert rates["full"] == pytest.approx(10 ** (-6 + 2.7))
    assert rates["lora"] == pytest.approx(10 ** (-5 + 2.7))


def test_the_method_that_learns_least_sets_the_level():
    weak = [(rate, learned / 2) for rate, learned in points(1)]
    level, rates = match_learning_rates({"full": points(1), "lora": weak}, share=0.8)
    assert level == pytest.approx(0.8 * 0.15)
    assert rates["full"] < rates["lora"]


def test_a_grid_that_starts_too_high_is_refused():
    with pytest.raises(UserError, match="lora: no two neighbouring rates"):
        match_learning_rates({"full": points(1), "lora": [(1e-5, 0.4), (1e-4, 0.3)]})


def test_a_method_without_runs_has_no_level():
    with pytest.raises(UserError, match="lora: no run"):
        match_learning_rates({"full": points(1), "lora": []})
