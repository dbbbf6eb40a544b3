"""Rates at which methods learn the same, on points whose rates are known."""

import math

import pytest

from foundry_ext.utils.errors import UserError


def points(factor: float) -> list[tuple[float, float]]:
    """Learning that rises by 0.1 nats per decade and falls at the last rate."""
    rates = [factor * 10.0**power for power in range(-6, -1)]
    learned = [0.1 * (math.log10(rate / factor) + 6) for rate in rates]
    learned[-1] = 0.05
    return [*zip(rates, learned, strict=True)]


def test_rates_are_interpolated_below_the_best(modules):
    by_method = {method: points(10) for method in ("lora", "dora", "rslora")}
    level, rates = modules["match"].match({"full": points(1), **by_method})
    assert level == pytest.approx(0.9 * 0.3)
    assert rates["full"] == pytest.approx(10 ** (-6 + 2.7))
    assert rates["lora"] == pytest.approx(10 ** (-5 + 2.7))


def test_a_grid_that_starts_too_high_is_refused(modules):
    with pytest.raises(UserError, match="lora: no two neighbouring rates"):
        high = {"lora": [(1e-5, 0.4), (1e-4, 0.3)]}
        others = {method: points(1) for method in ("full", "dora", "rslora")}
        modules["match"].match(others | high)


def test_an_unfinished_stage_has_no_level(modules):
    with pytest.raises(UserError, match="no finished run of dora, rslora"):
        modules["match"].match({"full": points(1), "lora": points(10)})


def test_only_runs_of_stage_a_count(modules):
    def record(**changes):
        plain = {"mixture": "none", "slice": 1, "weights": "q4_1", "learning_rate": "low"}
        variables = plain | {key: changes[key] for key in plain.keys() & changes.keys()}
        return {
            "config": {"variables": variables},
            "seed": changes.get("seed", 17),
            "model": {"rank": changes.get("rank", 64)},
            "method": "lora",
            "learning_rate": changes.get("rate", 1e-3),
            "evaluations": [{"learning": {"target_loss": 0.4}}],
        }

    others = [
        record(mixture="replay"),
        record(slice=2),
        record(weights="hub"),
        record(learning_rate="matched"),
        record(seed=18),
        record(rank=8),
    ]
    found = modules["match"].stage_a([*others, record(rate=2e-3), record(rate=1e-3)])
    assert found == {"lora": [(1e-3, 0.4), (2e-3, 0.4)]}
