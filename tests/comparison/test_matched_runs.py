"""Runs at learning rates chosen for equal learning: kept apart from the grid, compared by seeds."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from foundry_ext.comparison.comparison import Comparison, compare_runs
from foundry_ext.comparison.report.matched import matched_rate_sentences
from foundry_ext.comparison.report.report import caveats, write_report
from foundry_ext.comparison.runs import Loaded, Run, load_runs
from foundry_ext.utils.errors import UserError
from tests.comparison import records

SEEDS = (17, 18, 19)
# Both learn 4.0 at these rates, and LoRA forgets 0.4 less for it.
FULL = replace(records.TRUTHS["full"], most=4.0, peak=1.5e-3, cost=0.16)
LORA = replace(records.TRUTHS["lora"], most=4.0, peak=1.2e-2, cost=0.135)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("matched")
    for method in ("full", "lora"):
        for rate in records.TRUTHS[method].rates:
            records.write_run(folder / "grid", method, rate, 17)
    for method, truth in (("full", FULL), ("lora", LORA)):
        for seed in SEEDS:
            records.write_run(folder / "matched", method, truth.peak, seed, truth=truth)
    return folder


@pytest.fixture(scope="module")
def comparison(folder: Path) -> Comparison:
    matched = load_runs([str(folder / "matched")]).runs
    return compare_runs(load_runs([str(folder / "grid")]), matched_runs=matched)


def test_the_grid_does_not_see_the_matched_runs(folder: Path, comparison: Comparison):
    alone = compare_runs(load_runs([str(folder / "grid")]))
    assert comparison.best == alone.best
    assert comparison.fronts.areas == alone.fronts.areas
    assert len(comparison.runs) == len(alone.runs) == 6


def test_forgetting_is_compared_over_the_seeds(comparison: Comparison):
    at_rates = comparison.at_matched_rates
    assert at_rates is not None and at_rates.is_in_general
    assert at_rates.rates == {"full": 1.5e-3, "LoRA": 1.2e-2}
    (learned,), (forgot,) = (
        at_rates.pairs[m] for m in (comparison.learning, comparison.forgetting)
    )
    assert not learned.is_distinguishable
    assert forgot.is_distinguishable and forgot.in_general and forgot.seeds == (SEEDS, SEEDS)
    assert forgot.interval and forgot.interval.low < 0.4 < forgot.interval.high
    first, finding = matched_rate_sentences(comparison)
    assert "no two are distinguishable" in first
    assert "full forgets more than LoRA" in finding and "In these runs" not in finding


def test_unequal_learning_is_said_beside_the_finding(folder: Path, tmp_path: Path):
    more = replace(FULL, most=4.6)
    for seed in SEEDS:
        records.write_run(tmp_path, "full", more.peak, seed, truth=more)
    matched = load_runs([str(tmp_path), *map(str, (folder / "matched").glob("lora*"))]).runs
    comparison = compare_runs(load_runs([str(folder / "grid")]), matched_runs=matched)
    first, finding = matched_rate_sentences(comparison)
    assert "not equally" in first and "more than LoRA" in first
    assert "so this is not at equal learning" in finding


def test_the_report_has_them(comparison: Comparison, tmp_path: Path):
    write_report(comparison, tmp_path)
    text = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert "### At learning rates chosen for equal learning" in text
    assert "### Along the fronts" in text
    assert text.count("| matched |") == 6
    data = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    keys = [pair["measure"] for pair in data["at_matched_rates"]["pairs"]]
    assert keys == [metric.key for metric in comparison.metrics]
    (few, *_) = caveats(comparison)
    assert "not ranked" in few and "No claim" not in few


def test_one_seed_ranks_nothing_beside_matched_runs(folder: Path, comparison: Comparison):
    assert not (comparison.pairs or comparison.fronts.area_pairs or comparison.fronts.level_pairs)
    alone = compare_runs(load_runs([str(folder / "grid")]))
    assert alone.pairs and alone.fronts.area_pairs


def test_a_matched_rate_need_not_be_on_the_grid(folder: Path):
    """The YAMLs of stage b name a rate that those of stage a did not have."""

    def with_rates(path: Path, *names: str) -> list[Run]:
        return [
            replace(run, record={**run.record, "config": run.record["config"] | grid})
            for run in load_runs([str(path)]).runs
            for grid in [{"variables": {"learning_rates": dict.fromkeys(names, 1e-3)}}]
        ]

    loaded = Loaded(runs=with_rates(folder / "grid", "low", "high"))
    matched = with_rates(folder / "matched", "low", "high", "matched")
    comparison = compare_runs(loaded, matched_runs=matched)
    assert comparison.at_matched_rates and not comparison.accepted


def test_a_second_rate_of_a_method_is_refused(folder: Path):
    matched = load_runs([str(folder / "matched"), str(folder / "grid")]).runs
    with pytest.raises(UserError, match=r"full has --matched runs at 0\.0005, 0\.001, 0\.0015"):
        compare_runs(load_runs([str(folder / "grid")]), matched_runs=matched)


def test_methods_must_be_those_of_the_grid(folder: Path):
    matched = load_runs([*map(str, (folder / "matched").glob("lora*"))]).runs
    with pytest.raises(UserError, match="full: give runs of the same methods"):
        compare_runs(load_runs([str(folder / "grid")]), matched_runs=matched)
