"""The simulation's truth, and a short run of it with bounds that a wrong interval breaks."""

import numpy as np
import pytest

from experiments.simulations.fronts import TRUTHS, Expected, Noise, draw, simulate
from tests.tiers import one_of


def test_the_expected_values_are_those_of_the_draws():
    """Means over many drawn trials agree with the truth that intervals are held against."""
    truth = TRUTHS["different, noisier at high rates"]
    rng = np.random.default_rng(1)
    method = truth.methods["A"]
    expected = Expected(method, truth.noise, rng, 4000)
    drawn = [draw(truth, 5, rng, resamples=1)["A"] for _ in range(120)]
    areas = [each.hypervolumes(4.0).mean for each in drawn]
    error = np.std(areas) / np.sqrt(len(areas))
    assert abs(np.mean(areas) - expected.area(4.0)) < 4 * error
    levels = [each.forgetting_at(3.0)[0].mean for each in drawn]
    error = np.std(levels) / np.sqrt(len(levels))
    assert abs(np.mean(levels) - expected.forgetting(3.0)) < 4 * error


def test_without_noise_the_expected_values_are_exact():
    quiet = Noise(*[0.0] * 6)
    expected = Expected(TRUTHS["equal"].methods["A"], quiet, np.random.default_rng(2), 2000)
    # 1.6 * 0.5 + 2.6 * 0.9 + 3.2 * 0.8
    assert expected.area(2.5) == pytest.approx(5.7)
    assert expected.forgetting(2.9) == pytest.approx(1.25)
    assert np.isnan(expected.forgetting(4.0))  # the most is 3.5


@pytest.mark.parametrize(
    "name", one_of(["equal", "equal, items decide", "equal, seeds decide"], "equal")
)
def test_intervals_cover_and_equal_methods_are_not_told_apart(name: str):
    """95 % of 120 trials are 114; 105 or fewer have a probability of 1 in 1,000."""
    for counts in simulate(TRUTHS[name], 3, 120, fresh=4000):
        assert counts.pairs_covered >= 106
        assert counts.covered >= 212
        assert counts.families_found <= 14


def test_different_methods_are_told_apart_in_the_right_direction():
    areas, levels = simulate(TRUTHS["different"], 5, 30, fresh=4000)
    assert areas.families_found > 20 and levels.families_found > 10
    assert areas.wrong_sign == levels.wrong_sign == 0
