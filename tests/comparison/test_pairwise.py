"""Findings about pairs of methods and about the trade-off."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from foundry_ext.comparison.comparison import Comparison, compare_runs, dominated_points
from foundry_ext.comparison.metrics import Metric, final_value, item_changes, shared_metrics
from foundry_ext.comparison.runs import Loaded, Run, labelled, load_runs
from foundry_ext.comparison.tradeoff import (
    Point,
    first_crossing,
    matched,
    matched_pairs,
    pareto_front,
    points,
)
from tests.comparison import records

LEARNING = Metric("learning", "target_loss")
FORGETTING = Metric("forgetting", "source_loss")


def pair(comparison: Comparison, metric: Metric, first: str, second: str):
    return next(
        one for one in comparison.pairs_of(metric) if (one.first, one.second) == (first, second)
    )


def test_items_make_up_the_records_values(comparison: Comparison):
    runs = [run for group in comparison.groups.values() for run in group]
    for metric in [*shared_metrics(runs, "learning"), *shared_metrics(runs, "forgetting")]:
        for run in runs[::5]:
            values, weights = np.array(list(item_changes(run, metric).values())).T
            assert values.sum() / weights.sum() == pytest.approx(final_value(run, metric))


def test_measures_are_each_sets_own(comparison: Comparison):
    keys = [metric.key for metric in comparison.metrics]
    # acc_norm is the set's metric; the mean accuracy of one set is that set's.
    assert keys == ["target_loss", "source_loss", "source_kl", "arc_challenge_acc_norm"]


def test_true_differences_are_found_and_others_are_not(comparison: Comparison):
    """By construction full learns and forgets most, and LoRA and DoRA are equal."""
    for metric in (LEARNING, FORGETTING):
        for other in ("LoRA", "DoRA", "rsLoRA"):
            found = pair(comparison, metric, "full", other)
            assert found.is_distinguishable and found.difference > 0 and found.in_general
            assert f"full {'learns' if metric == LEARNING else 'forgets'} more" in found.sentence
        same = pair(comparison, metric, "LoRA", "DoRA")
        assert not same.is_distinguishable
        assert "not distinguishable" in same.sentence and "80 % power" in same.sentence
    truth = records.TRUTHS["full"].most - records.TRUTHS["lora"].most
    found = pair(comparison, LEARNING, "full", "LoRA").interval
    assert found is not None and found.low < truth * (1 - np.exp(-4)) < found.high


def planted(tmp_path: Path, seeds: tuple[int, ...], other_seeds: tuple[int, ...]) -> Loaded:
    """Plant one method under two names."""
    truth = records.TRUTHS["lora"]
    for seed in seeds:
        records.write_run(tmp_path, "lora", 1e-2, seed, truth=truth, num_items=60)
    for seed in other_seeds:
        records.write_run(tmp_path, "dora", 1e-2, seed, truth=truth, num_items=60)
    return load_runs([str(tmp_path)])


@pytest.mark.parametrize(
    ("seeds", "other_seeds", "paired"),
    [
        ((1, 2, 3), (1, 2, 3), True),
        ((1, 2, 3), (4, 5, 6, 7), False),
        ((1, 2, 3), (3, 4, 5), False),  # one seed in common is too few to pair by
    ],
)
def test_a_method_against_itself_is_not_distinguishable(tmp_path, seeds, other_seeds, paired):
    comparison = compare_runs(planted(tmp_path, seeds, other_seeds))
    assert len(comparison.pairs) == 4
    for one in comparison.pairs:
        assert (one.seeds[0] == one.seeds[1]) == paired
        assert one.in_general and not one.is_distinguishable, one.sentence
        assert "not distinguishable" in one.sentence


def test_identical_copies_are_not_distinguishable(tmp_path: Path):
    loaded = planted(tmp_path, (1, 2, 3), ())
    copies = [
        type(run)({**run.record, "method": "dora", "run_name": f"copy of {run.name}"}, run.items)
        for run in loaded.runs
    ]
    comparison = compare_runs(Loaded(labelled([*loaded.runs, *copies])))
    assert list(comparison.groups) == ["LoRA", "DoRA"]
    for one in comparison.pairs:
        assert one.difference == 0 and one.p == 1 and not one.is_distinguishable
        assert "no number of items or seeds" in one.sentence


def test_few_seeds_speak_of_the_runs_alone(tmp_path: Path):
    records.write_run(tmp_path, "full", 2e-3, 17, num_items=60)
    records.write_run(tmp_path, "lora", 1e-2, 17, num_items=60)
    comparison = compare_runs(load_runs([str(tmp_path)]))
    assert not comparison.is_in_general
    for one in comparison.pairs:
        assert not one.in_general and one.sentence.startswith("In these runs, ")
        assert one.interval is not None and one.interval.kind == "items"
        assert one.seeds_needed is None
    answers = comparison.pairs[-1]
    assert answers.metric.is_binary and answers.mcnemar is not None
    assert answers.p == answers.mcnemar.p


def test_without_items_seeds_alone_vary(tmp_path: Path):
    for method, rate in (("full", 2e-3), ("lora", 1e-2)):
        for seed in (1, 2, 3):
            folder = records.write_run(tmp_path, method, rate, seed, num_items=20)
            (folder / "items.jsonl").unlink()
    comparison = compare_runs(load_runs([str(tmp_path)]))
    found = pair(comparison, LEARNING, "full", "LoRA")
    assert found.interval is not None and found.interval.kind == "seeds"
    assert found.is_distinguishable and found.num_items is None
    one_seed = [run for group in comparison.groups.values() for run in group if run.seed == 1]
    alone = pair(compare_runs(Loaded(one_seed)), LEARNING, "full", "LoRA")
    assert alone.interval is None and not alone.is_distinguishable
    assert "neither items nor 3 seeds" in alone.sentence


def test_items_that_are_not_the_records_are_not_used(tmp_path: Path):
    for seed in (1, 2, 3):
        folder = records.write_run(tmp_path, "lora", 1e-2, seed, num_items=20)
    lines = (folder / "items.jsonl").read_text().splitlines()
    (folder / "items.jsonl").write_text("\n".join(lines[:-9]) + "\n")
    comparison = compare_runs(load_runs([str(tmp_path)]))
    assert {one.num_items for one in comparison.summaries} == {None}
    assert {one.interval.kind for one in comparison.summaries if one.interval} == {"seeds"}


def test_items_of_another_evaluation_are_not_used(tmp_path: Path):
    """Items that do not add up to the record's value are not used."""
    folder = records.write_run(tmp_path, "lora", 1e-2, 1, num_items=20)
    record = json.loads((folder / "record.json").read_text())
    record["evaluations"][-1]["learning"]["target_loss"] += 0.1
    (folder / "record.json").write_text(json.dumps(record))
    comparison = compare_runs(load_runs([str(tmp_path)]))
    assert comparison.summary("LoRA", LEARNING).num_items is None
    assert comparison.summary("LoRA", FORGETTING).num_items == 20


def test_mean_accuracy_counts_every_set_the_same():
    lines = []
    for step, right in ((0, 1), (80, 0)):
        for name, num, lost in (("big", 8, 2), ("small", 2, 1)):
            for i in range(num):
                answer = right if i < lost else 1
                line = {"step": step, "set": name, "item": str(i), "acc": answer}
                lines.append({**line, "acc_norm": 1})
    evaluations = [
        {"step": 0, "learning": {}, "forgetting": {}},
        {"step": 80, "learning": {}, "forgetting": {"big_acc": 0.25, "small_acc": 0.5}},
    ]
    run = Run({"config": {}, "evaluations": evaluations}, lines)
    items = item_changes(run, Metric("forgetting", "mean_accuracy"))
    values, weights = np.array(list(items.values())).T
    assert values.sum() / weights.sum() == pytest.approx((0.25 + 0.5) / 2)


def test_a_log_probability_is_forgotten_in_nats_per_answer():
    from foundry_ext.comparison.runs import Run

    lines = [
        {"step": step, "set": "arc", "item": str(item), "logprob": base - step / 40}
        for item, base in enumerate((-3.0, -5.0))
        for step in (0, 80)
    ]
    forgotten = {"arc_logprob": 2.0, "arc_acc": 0.0}
    evaluations = [
        {"step": 0, "learning": {}, "forgetting": {}},
        {"step": 80, "learning": {}, "forgetting": forgotten},
    ]
    run = Run({"config": {}, "evaluations": evaluations}, lines)
    logprob, accuracy = shared_metrics([run], "forgetting")
    assert (logprob.key, accuracy.key) == ("arc_logprob", "arc_acc"), "both are reported"
    assert item_changes(run, logprob) == {"0": (2.0, 1.0), "1": (2.0, 1.0)}
    assert (logprob.unit, logprob.show(2.0), logprob.set_name) == (
        "nats per answer",
        "2.000",
        "arc",
    )
    assert not logprob.is_binary


# --- the trade-off -------------------------------------------------------------------------------


def test_pareto_front_by_hand():
    positions = [(1.0, 1.0), (2.0, 1.0), (3.0, 2.0), (2.5, 2.5), (0.5, 0.2), (3.0, 2.0)]
    candidates = [
        Point(str(index), 1e-3, *position, (17,)) for index, position in enumerate(positions)
    ]
    assert [point.label for point in pareto_front(candidates)] == ["4", "1", "2", "5"]


def test_crossing_interpolates_and_never_extrapolates():
    path = np.array([[0.0, 0.0], [2.0, 1.0], [1.0, 3.0], [4.0, 5.0]])
    assert first_crossing(path, 1.0) == pytest.approx(0.5)
    assert first_crossing(path, 2.0) == pytest.approx(1.0)
    assert first_crossing(path, 3.0) == pytest.approx(3 + 2 * 2 / 3)
    assert first_crossing(path, 4.0) == pytest.approx(5.0)
    assert first_crossing(path, 4.1) is None
    assert first_crossing(path, -0.1) is None


def test_matched_learning_says_who_does_not_reach_it(comparison: Comparison):
    half, common, high = comparison.matched
    assert half == pytest.approx(common / 2)
    for label in comparison.groups:
        at = comparison.matched[common][label]
        assert at.mean is not None and at.interval is not None and at.num_seeds == 3
        assert at.interval.low < at.mean < at.interval.high
    assert comparison.matched[high]["full"].mean is not None
    assert comparison.matched[high]["LoRA"].mean is None
    assert comparison.matched[high]["LoRA"].over_rates is None
    # The lowest learning rate already learns more than half: between rates there is nothing.
    assert comparison.matched[half]["LoRA"].over_rates is None
    ends = [
        point for point in points(comparison.groups, LEARNING, FORGETTING) if point.label == "LoRA"
    ]
    least = min(point.forgetting for point in ends)
    assert comparison.matched[half]["LoRA"].at_most == pytest.approx(least)
    assert comparison.matched[high]["LoRA"].at_most is None


def test_a_method_beaten_at_a_rate_that_was_not_chosen_is_named(tmp_path: Path):
    """Full fine-tuning beats LoRA at a low rate, but forgets more at its best rate."""
    cheap = replace(records.TRUTHS["full"], cost=0.02, most=4.5)
    records.write_run(tmp_path, "full", 1e-3, 17, truth=cheap, num_items=20)
    records.write_run(tmp_path, "full", 2e-3, 17, num_items=20)
    records.write_run(tmp_path, "lora", 1e-2, 17, num_items=20)
    comparison = compare_runs(load_runs([str(tmp_path)]))
    assert comparison.best["full"].learning_rate == 2e-3
    ((worse, better),) = dominated_points(comparison)
    assert (worse.label, better.label, better.learning_rate) == ("LoRA", "full", 1e-3)
    assert better.learning > worse.learning and better.forgetting < worse.forgetting


def test_what_holm_holds_back_needs_more_than_there_is(tmp_path: Path):
    """A pair held back by Holm must not be said to need the three seeds that it already has."""
    held_back = 0
    for case in range(8):
        folder = tmp_path / str(case)
        for number, method in enumerate(("full", "lora", "dora", "rslora")):
            truth = replace(records.TRUTHS["lora"], most=3.9 + 0.05 * number)
            for seed in range(3 * case, 3 * case + 3):
                records.write_run(folder, method, 1e-2, seed, truth=truth, num_items=20)
        for one in compare_runs(load_runs([str(folder)])).pairs:
            if one.is_distinguishable:
                continue
            held_back += one.interval is not None and not one.interval.includes_zero
            assert one.num_tests == 6
            assert one.seeds_needed is None or one.seeds_needed > 3, one.sentence
            assert one.items_needed is None or one.items_needed > 20, one.sentence
    assert held_back > 0  # by Holm's correction alone


def test_methods_are_compared_at_matched_learning(comparison: Comparison):
    assert comparison.common_level is not None
    found = {
        (one.first, one.second): one
        for one in matched_pairs(comparison.matched[comparison.common_level])
    }
    assert len(found) == 6
    assert found["full", "LoRA"].is_distinguishable and found["full", "LoRA"].difference > 0
    assert not found["LoRA", "DoRA"].is_distinguishable
    alone = matched_pairs(
        {
            label: matched(runs[:1], runs[:1], LEARNING, FORGETTING, comparison.common_level)
            for label, runs in comparison.chosen.items()
        }
    )
    assert not any(one.is_distinguishable or one.interval for one in alone)


def test_a_level_that_one_seed_does_not_reach_has_no_mean(comparison: Comparison):
    runs = sorted(comparison.chosen["LoRA"], key=lambda run: final_value(run, LEARNING))
    level = (final_value(runs[1], LEARNING) + final_value(runs[2], LEARNING)) / 2
    found = matched(runs, runs, LEARNING, FORGETTING, level)
    assert list(found.by_seed) == [runs[2].seed] and found.num_seeds == 3
    assert found.mean is None and found.interval is None


def test_matched_learning_is_the_runs_own_curve(comparison: Comparison):
    runs = comparison.chosen["LoRA"]
    middle = runs[0].record["evaluations"][1]
    level = middle["learning"]["target_loss"]
    found = matched(runs[:1], runs[:1], LEARNING, FORGETTING, level)
    assert found.mean == pytest.approx(middle["forgetting"]["source_loss"])
    assert found.interval is None and not found.is_early
    early = matched(runs[:1], runs[:1], LEARNING, FORGETTING, level / 2)
    assert early.is_early and early.mean == pytest.approx(middle["forgetting"]["source_loss"] / 2)
