"""Runs that are found or left out, their labels, and which runs may be compared."""

import json
from pathlib import Path
from typing import Any

import pytest

from foundry_ext.comparison.comparability import check_comparable
from foundry_ext.comparison.comparison import compare_runs
from foundry_ext.comparison.learning_rates import best_learning_rate
from foundry_ext.comparison.runs import by_label, load_runs
from tests.comparison import records


def edit(folder: Path, **changes: Any) -> None:
    """Change dotted keys (with __ for the dot) of a run's record."""
    path = folder / "record.json"
    record = json.loads(path.read_text())
    for key, value in changes.items():
        *above, last = key.split("__")
        node = record
        for part in above:
            node = node[int(part)] if isinstance(node, list) else node[part]
        node[last] = value
    path.write_text(json.dumps(record))


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Write a full and a LoRA run, at one learning rate each."""
    full = records.write_run(tmp_path, "full", 2e-3, 17, num_items=20)
    lora = records.write_run(tmp_path, "lora", 1e-2, 17, num_items=20)
    return full, lora


def test_every_way_to_name_runs(two, tmp_path: Path):
    full, lora = two
    offline = tmp_path / "elsewhere" / "wandb" / "offline-run-20260101_000000-abc"
    (offline / "files").mkdir(parents=True)
    for name in ("record.json", "items.jsonl"):
        (offline / "files" / name).write_bytes((lora / name).read_bytes())
    for references in (
        [full, lora],
        [full / "record.json", lora],
        [full, offline],
        [full, lora, full / "record.json"],
    ):
        loaded = load_runs([str(one) for one in references])
        assert load_runs(references).runs == loaded.runs, "paths are as good as texts"
        assert [run.label for run in loaded.runs] == ["full", "LoRA"]
        assert all(len(run.items) == 180 for run in loaded.runs)
    # A folder of runs, with W&B's copies below it, holds each run once.
    assert len(load_runs([str(tmp_path)]).runs) == 2


@pytest.mark.parametrize(("content", "error"), [(None, FileNotFoundError), ("{}", ValueError)])
def test_what_is_no_run_is_refused(tmp_path: Path, content, error):
    if content is not None:
        (tmp_path / "record.json").write_text(content)
    with pytest.raises(error, match=str(tmp_path)):
        load_runs([str(tmp_path)])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"status": "running"}, "unfinished"),
        ({"status": "failed", "error": "OutOfMemoryError: 3 GiB"}, "OutOfMemoryError"),
        ({"status": "stopped"}, "stopped before its end"),
        ({"evaluations": []}, "no evaluation"),
        ({"evaluations__-1__learning": {}}, "learning was not measured: its YAML has no set"),
        ({"evaluations__-1__forgetting": {}}, "forgetting was not measured"),
        ({"evaluations__-1__learning__target_loss": float("nan")}, "diverged"),
    ],
)
def test_a_run_that_cannot_be_compared_is_named(two, changes, reason):
    full, lora = two
    edit(lora, **changes)
    loaded = load_runs([str(full), str(lora)])
    assert [run.label for run in loaded.runs] == ["full"]
    assert reason in loaded.left_out[lora.name]
    with pytest.raises(ValueError, match=reason):
        load_runs([str(lora)])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data__train__fingerprint": "ffff"}, "data.train.fingerprint"),
        ({"data__eval__source__fingerprint": "ffff"}, "data.eval.source.fingerprint"),
        ({"steps": 81}, "steps"),
        ({"tokens__real": 160_001}, "tokens.real"),
        ({"model__name": "another"}, "model.name"),
        ({"model__parameters": 2_000_000}, "model.parameters"),
        ({"evaluations__0__metrics__source/loss": 3.3}, "base.source/loss"),
        ({"evaluations__0__metrics__arc_challenge/acc": 0.9}, "base.arc_challenge/acc"),
        ({"evaluations__1__step": 41}, "evaluation.steps"),
        ({"evaluations__-1__forgetting__other_loss": 1.0}, "evaluation.measures"),
        ({"config__max_duration": "81ba"}, "max_duration"),
        ({"config__optimizer__weight_decay": 0.1}, "optimizer.weight_decay"),
    ],
)
def test_every_other_difference_is_refused_by_name_and_can_be_allowed(two, changes, named):
    full, lora = two
    edit(lora, **changes)
    runs = load_runs([str(full), str(lora)]).runs
    with pytest.raises(ValueError, match=named.replace(".", r"\.")) as refusal:
        check_comparable(runs)
    assert lora.name in str(refusal.value)
    accepted = check_comparable(runs, [named])
    assert len(accepted) == 1 and accepted[0].startswith(f"{named}: ")
    with pytest.raises(ValueError, match="differ in more"):
        check_comparable(runs, [named + "x"])


def test_a_default_that_one_yaml_writes_out_is_no_difference(two):
    full, lora = two
    config = json.loads((full / "record.json").read_text())["config"]
    edit(full, config__optimizer={**config["optimizer"], "eps": 1e-8})
    with pytest.raises(ValueError, match=r"optimizer\.eps: "):  # unknown in earlier records
        check_comparable(load_runs(map(str, two)).runs)
    edit(lora, defaults={"optimizer.eps": 1e-08})
    assert check_comparable(load_runs(map(str, two)).runs) == []
    edit(lora, defaults={"optimizer.eps": 1e-6})
    with pytest.raises(ValueError, match=r"optimizer\.eps: "):
        check_comparable(load_runs(map(str, two)).runs)


def test_names_seeds_methods_and_learning_rates_may_differ(sweep: Path):
    assert check_comparable(load_runs([str(sweep)]).runs) == []


def test_tokens_of_other_seeds_may_differ_a_little(two, tmp_path: Path):
    full, lora = two
    other = records.write_run(tmp_path, "lora", 1e-2, 18, num_items=20)
    edit(other, tokens__real=161_800)  # the quickstart's seeds 20 and 21 differ as much
    references = [str(full), str(lora), str(other)]
    assert check_comparable(load_runs(references).runs) == []
    edit(other, tokens__real=170_000)
    with pytest.raises(ValueError, match=r"tokens\.real"):
        check_comparable(load_runs(references).runs)


def test_runs_of_one_method_that_differ_by_rank_are_two_groups(two, tmp_path: Path):
    _, lora = two
    other = records.write_run(tmp_path / "wide", "lora", 1e-2, 17, num_items=20)
    edit(other, model__rank=64, run_name="wide")
    labels = list(by_label(load_runs([str(lora), str(other)]).runs))
    assert labels == ["LoRA r64", "LoRA r8"]


def test_an_allowed_setting_makes_groups(two, tmp_path: Path):
    _, lora = two
    other = records.write_run(tmp_path / "decayed", "lora", 1e-2, 17, num_items=20)
    edit(other, config__optimizer__weight_decay=0.1, run_name="decayed")
    loaded = load_runs([str(lora), str(other)])
    compared = compare_runs(loaded, allow=["optimizer.weight_decay"])
    assert list(compared.groups) == ["LoRA", "LoRA weight_decay 0.1"]
    assert any("optimizer.weight_decay" in sentence for sentence in compared.accepted)


def test_groups_whose_long_settings_begin_alike_stay_two(two, tmp_path: Path):
    references = []
    for seed, version in ((17, "v1"), (18, "v2")):
        run = records.write_run(tmp_path / version, "lora", 1e-2, seed, num_items=20)
        name = f"organisation/a-rather-long-name-of-a-data-set-{version}"
        edit(run, config__train_loader={"dataset": {"hf_name": name}}, run_name=version)
        references.append(str(run))
    compared = compare_runs(load_runs(references), allow=["train_loader"])
    assert [len(runs) for runs in compared.groups.values()] == [1, 1]


def test_a_learning_rate_that_diverged_was_tried(two, tmp_path: Path):
    """It ends the grid, so the rate below is not at the edge; other settings' runs do not count."""
    full, lora = two
    rates = [records.write_run(tmp_path, "full", rate, 17, num_items=20) for rate in (1e-3, 4e-3)]
    other = records.write_run(tmp_path / "other", "lora", 2e-2, 17, num_items=20)
    edit(other, config__model__peft_config__lora_dropout=0.1)
    for run in (rates[1], other):
        edit(run, **{"evaluations__-1__learning__target_loss": float("nan")})
    compared = compare_runs(load_runs([str(one) for one in (full, lora, *rates, other)]))
    best = compared.best["full"]
    assert (best.learning_rate, best.edge) == (2e-3, None)
    assert best.means[4e-3] == float("-inf")
    assert [run.learning_rate for run in compared.diverged["full"]] == [4e-3]
    assert list(compared.best["LoRA"].means) == [1e-2] and not compared.diverged["LoRA"]
    assert len(compared.groups["full"]) == 2


def test_where_every_rate_has_a_run_that_diverged_the_others_decide():
    nan = float("nan")
    runs = [ended(1, 1, 2.0), ended(1, 2, nan), ended(2, 1, 3.0), ended(2, 2, nan)]
    assert best_learning_rate(runs).learning_rate == 2


def test_two_runs_that_nothing_tells_apart_are_refused(two, tmp_path: Path):
    _, lora = two
    other = records.write_run(tmp_path / "again", "lora", 1e-2, 17, num_items=20)
    with pytest.raises(ValueError, match=r"both LoRA at learning rate 0\.01 with seed 17"):
        compare_runs(load_runs([str(lora), str(other)]))


# --- the learning rate ---------------------------------------------------------------------------


def ended(rate: float, seed: int, learned: float) -> dict[str, Any]:
    return {
        "run_name": f"r{rate}",
        "method": "lora",
        "learning_rate": rate,
        "seed": seed,
        "evaluations": [{"learning": {"task_acc": 0.5, "target_loss": learned}}],
    }


def test_the_best_learning_rate_has_the_highest_mean_learning():
    best = best_learning_rate(
        [
            *(ended(1e-3, 1, 2.0), ended(1e-3, 2, 2.2), ended(2e-3, 1, 2.1), ended(2e-3, 2, 2.4)),
            *(ended(4e-3, 1, 2.5), ended(4e-3, 2, 1.0)),
        ]
    )
    assert (best.learning_rate, best.metric, best.edge) == (2e-3, "target_loss", None)
    assert best.means == pytest.approx({1e-3: 2.1, 2e-3: 2.25, 4e-3: 1.75})
    assert best.seeds == (1, 2)


def test_further_seeds_of_the_winner_do_not_change_the_choice():
    runs = [ended(1e-3, 1, 2.0), ended(2e-3, 1, 2.1), ended(2e-3, 2, 1.0), ended(2e-3, 3, 1.0)]
    best = best_learning_rate(runs)
    assert (best.learning_rate, best.seeds) == (2e-3, (1,))


@pytest.mark.parametrize(
    ("learned", "edge"), [((3, 2, 1), "lowest"), ((1, 2, 3), "highest"), ((1, 3, 2), None)]
)
def test_the_edge_of_the_grid_is_seen(learned, edge):
    runs = [ended(rate, 1, value) for rate, value in zip((1, 2, 4), learned, strict=True)]
    assert best_learning_rate(runs).edge == edge
    assert best_learning_rate(runs[:1]).edge is None


def test_a_run_that_diverged_is_never_the_best():
    nan = float("nan")
    assert best_learning_rate([ended(1, 1, nan), ended(2, 1, -3.0)]).learning_rate == 2
    assert best_learning_rate([ended(1, 1, -3.0), ended(2, 1, nan)]).learning_rate == 1
    with pytest.raises(ValueError, match="lora: diverged at every"):
        best_learning_rate([ended(1, 1, nan), ended(2, 1, nan)])


def test_no_runs_and_no_such_measure_are_refused():
    with pytest.raises(ValueError, match="no runs"):
        best_learning_rate([])
    with pytest.raises(ValueError, match=r"no gsm8k_acc .* task_acc, target_loss"):
        best_learning_rate([ended(1, 1, 1)], "gsm8k_acc")
