"""Points by seed and rate, fronts, and forgetting along a front."""

import json
from pathlib import Path

import numpy as np
import pytest

from foundry_ext.comparison.comparison import compare_runs
from foundry_ext.comparison.fronts import SeedPoints, forgetting_at, front_of, resampled_ratios
from foundry_ext.comparison.metrics import Metric, final_value
from foundry_ext.comparison.runs import Run, load_runs
from foundry_ext.comparison.statistics import influences
from foundry_ext.comparison.tradeoff import Point, matched, pareto_front
from tests.comparison import records

METRICS = Metric("learning", "target_loss"), Metric("forgetting", "source_loss")


def test_a_front_is_the_pareto_front():
    rng = np.random.default_rng(1)
    for _ in range(200):
        learned, forgot = rng.integers(0, 6, size=(2, 5)).astype(float)
        candidates = [
            Point("", 1, *position, (1,)) for position in zip(learned, forgot, strict=True)
        ]
        theirs = sorted({point.position for point in pareto_front(candidates)})
        ours = front_of(learned, forgot)
        assert list(zip(learned[ours], forgot[ours], strict=True)) == theirs
    assert front_of(np.array([-np.inf, -np.inf]), np.array([np.inf, np.inf])).tolist() == [0]


def test_forgetting_is_read_off_the_front_not_off_the_path_by_rate():
    """In the order of rates, the middle one is worse in both; the path would cross 2 above it."""
    ends = np.array([1.0, 1.5, 3.0]), np.array([1.0, 5.0, 2.0])
    assert forgetting_at(*ends, 2.0) == 1.5
    assert forgetting_at(*ends, 3.0) == 2
    assert forgetting_at(*ends, 1.0) == 1
    assert forgetting_at(*ends, 0.5) == 1  # all of the front learned more
    assert forgetting_at(*ends, 3.5) == 2  # nothing learned as much


def test_forgetting_of_many_fronts_is_interpolated_along_each():
    rng = np.random.default_rng(2)
    learned, forgot = rng.integers(-3, 6, size=(2, 400, 5)).astype(float)
    learned[::7, 2], forgot[::7, 2] = -np.inf, np.inf
    ours = forgetting_at(learned, forgot, 1.5)
    for index in range(400):
        front = front_of(learned[index], forgot[index])
        theirs = np.interp(1.5, learned[index][front], forgot[index][front])
        assert ours[index] == pytest.approx(theirs)


def test_seeds_reach_a_level_each_on_its_own_front():
    points = SeedPoints(
        (1e-3, 1e-2), (4, 7), np.array([[1.0, 3.0], [2.0, 4.0]]), np.array([[0.0, 2.0], [1.0, 2.0]])
    )
    assert points.learned_on_front().tolist() == [[1, 3], [2, 4]]
    sample, bounds = points.forgetting_at(2.5)
    assert sample.values == {4: 1.5, 7: 1.25} and bounds == 0
    sample, bounds = points.forgetting_at(1.5)
    assert sample.values == {4: 0.5, 7: 1.0} and bounds == 1
    assert points.least_forgotten == 0.5
    assert points.hypervolumes(3.0).values == {4: 5.0, 7: 6.0}
    assert points.hypervolumes(3.0, 1.5).values == {4: 3.5, 7: 5.0}


def test_resampled_ratios_are_a_bootstrap():
    rng = np.random.default_rng(3)
    weights = rng.integers(5, 60, size=80).astype(float)
    values = weights * rng.normal(1.0, 0.5, size=(3, 80))
    values[2] = values[1]
    drawn = resampled_ratios(values, weights, resamples=4000)
    assert drawn.shape == (4000, 3) and (drawn[:, 1] == drawn[:, 2]).all()
    error = influences(values[0], weights).std(ddof=1) / np.sqrt(80)
    assert drawn[:, 0].mean() == pytest.approx(values[0].sum() / weights.sum(), abs=error / 10)
    assert drawn[:, 0].std(ddof=1) == pytest.approx(error, rel=0.06)


def test_points_are_the_runs_ends_of_seeds_that_ran_at_every_rate(tmp_path: Path):
    """Seed 2 lacks a rate; seed 3 diverged at one, which therefore counts as tried."""
    for seed in (1, 2, 3):
        for rate in records.TRUTHS["lora"].rates[: 1 if seed == 2 else 3]:
            folder = records.write_run(tmp_path, "lora", rate, seed, num_items=20)
    record = json.loads((folder / "record.json").read_text())
    record["evaluations"][-1]["forgetting"]["source_loss"] = float("inf")
    (folder / "record.json").write_text(json.dumps(record))
    comparison = compare_runs(load_runs([str(tmp_path)]))
    found = comparison.fronts.points["LoRA"]
    assert found.rates == records.TRUTHS["lora"].rates and found.seeds == (1, 3)
    assert found.learning[1, 2] == -np.inf and found.forgetting[1, 2] == np.inf
    x, y = METRICS
    run = next(r for r in comparison.runs if (r.seed, r.learning_rate) == (3, found.rates[1]))
    assert found.learning[1, 1] == final_value(run, x)
    assert found.forgetting[1, 1] == final_value(run, y)
    assert found.replicates is not None and found.num_items == 20
    for replicates, ends in zip(found.replicates, (found.learning, found.forgetting), strict=True):
        assert replicates.shape == (2000, 2, 3)
        finite = np.isfinite(ends)
        assert (np.isfinite(replicates) == finite).all()
        means = replicates.mean(0)
        assert means[finite] == pytest.approx(ends[finite], abs=0.02)


def test_matched_over_rates_follows_the_front():
    """By rate, the path leads through a rate that is worse in both, and crosses 2.0 on the way."""
    ends = {1e-3: (1.0, 1.0), 1e-2: (1.5, 5.0), 1e-1: (3.0, 2.0)}
    runs = [
        Run(
            {
                "seed": 1,
                "learning_rate": rate,
                "evaluations": [
                    {
                        "real_tokens": tokens,
                        "learning": {"target_loss": tokens * learned},
                        "forgetting": {"source_loss": tokens * forgot},
                    }
                    for tokens in (0, 1)
                ],
            }
        )
        for rate, (learned, forgot) in ends.items()
    ]
    found = matched(runs[2:], runs, *METRICS, 2.0)
    assert found.over_rates == pytest.approx(1.5) and found.at_most is None
    below = matched(runs[2:], runs, *METRICS, 0.9)
    assert below.over_rates is None and below.at_most == pytest.approx(1.0)
