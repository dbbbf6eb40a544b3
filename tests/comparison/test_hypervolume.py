"""The dominated area against counting squares, and the default reference."""

import numpy as np
import pytest

from foundry_ext.comparison.hypervolume import default_reference, hypervolume, round_up
from foundry_ext.comparison.tradeoff import Point


def count_squares(points, reference: int, start: int) -> int:
    """Count unit squares from learning 0, from the start to the reference, that are dominated."""
    return sum(
        any(learned >= x + 1 and forgot <= y for learned, forgot in points)
        for x in range(10)
        for y in range(start, reference)
    )


def test_the_area_is_that_of_all_dominated_squares():
    rng = np.random.default_rng(1)
    seen = set()
    for _ in range(300):
        points = np.stack([rng.integers(-3, 9, size=5), rng.integers(-2, 9, size=5)], 1)
        reference = int(rng.integers(1, 9))
        start = int(rng.integers(-3, reference))
        for each in (0, start):
            expected = count_squares(points.tolist(), reference, each)
            assert hypervolume(*points.T.astype(float), reference, each) == expected
            seen.add(expected)
        assert hypervolume(*points.T.astype(float), reference) == count_squares(
            points.tolist(), reference, 0
        )
    assert 0 in seen and len(seen) > 30


def test_the_docstrings_example():
    learned, forgot = np.array([3.0, 2.0]), np.array([2.0, 1.0])
    assert hypervolume(learned, forgot, 3.0) == 5
    # The integral over budgets that the docstring gives, by midpoints.
    budgets = (np.arange(3000) + 0.5) / 1000
    most = [max([0.0, *learned[forgot <= budget]]) for budget in budgets]
    assert hypervolume(learned, forgot, 3.0) / 3 == pytest.approx(np.mean(most))


def test_many_fronts_at_once_and_diverged_runs():
    rng = np.random.default_rng(2)
    learned, forgot = rng.normal(size=(2, 3, 4, 5))
    together = hypervolume(learned, forgot, 0.7)
    assert together.shape == (3, 4)
    assert together[2, 1] == hypervolume(learned[2, 1], forgot[2, 1], 0.7)
    diverged = [np.append(learned[2, 1], -np.inf), np.append(forgot[2, 1], np.inf)]
    assert hypervolume(*diverged, 0.7) == together[2, 1]
    nothing = np.full(2, np.inf)
    assert hypervolume(-nothing, nothing, 0.7) == 0


def points(*positions: tuple[float, float]) -> list[Point]:
    return [Point("", 10.0**-index, *each, (1,)) for index, each in enumerate(positions)]


def test_the_reference_lies_beyond_every_whole_front():
    """A rate that destroys more and learns less is on no front; a method asked about adds none."""
    fronts = {
        "A": points((1, 1), (2, 2), (1.9, 90)),
        "B": points((1.5, 0.5), (1.8, 3.01)),
        "C": points((-1, 70)),
    }
    assert default_reference(fronts) == 3.4  # 1.1 * 3.01 = 3.311, rounded up
    assert default_reference({"A": points((1, -0.1)), "B": points((-1, 2))}) is None
    assert default_reference({"A": points((1, 0.02))}) == 0.022


@pytest.mark.parametrize(
    ("value", "rounded"),
    [(1.0, 1.0), (0.1, 0.1), (3.31, 3.4), (99.1, 100), (0.00123, 0.0013), (1234, 1300), (2.2, 2.2)],
)
def test_rounding_up_to_two_digits(value: float, rounded: float):
    assert round_up(value) == rounded
