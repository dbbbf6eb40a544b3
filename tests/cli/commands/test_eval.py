"""`foundry-ext eval`: a finished model gives the same figures as its run."""

import json
import shutil

import pytest
import yaml

from foundry_ext.cli.main import main
from foundry_ext.models.scores import BaseStates
from foundry_ext.records.record import new_record, read_record, write_record
from tests.comparison.records import write_run
from tests.training import kit

CHOICES = [
    {"query": f"one {word}", "choices": ["a bird", "the river of light", "12"], "gold": 1}
    for word in ("bird", "stone", "river", "light")
]


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer_folder, make_rows):
    return kit.make_world(tmp_path_factory.mktemp("world"), tokenizer_folder, make_rows)


@pytest.fixture(scope="module")
def sets(world, tmp_path_factory):
    path = tmp_path_factory.mktemp("sets") / "choices.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in CHOICES))
    loader = kit.loader_config(world.eval_rows)
    return {
        "target": {"role": "learning", "type": "documents", "loader": loader},
        "source": {"role": "forgetting", "type": "documents", "kl": True, "loader": loader},
        "choice": {"role": "forgetting", "type": "multiple_choice", "path": str(path)},
    }


@pytest.fixture(scope="module")
def trained(world, sets, tmp_path_factory):
    """Return trained(method) -> (the callback's evaluations, the run's folder)."""
    made = {}

    def get(method):
        if method not in made:
            folder = tmp_path_factory.mktemp(method)
            settings = {
                "callbacks": {
                    "spy": {},
                    "forgetting": {"items": str(folder / "items.jsonl"), "sets": sets},
                    "hf_export": {"folder": str(folder / "hf")},
                },
                "eval_loader": kit.loader_config(world.eval_rows),
                "eval_interval": "1ep",
                "max_duration": "1ep",
            }
            run = kit.run(kit.run_config(world, folder, method, **settings))
            (callback,) = [
                c for c in run.trainer.state.callbacks if type(c).__name__ == "Forgetting"
            ]
            made[method] = callback.evaluations, folder
        return made[method]

    return get


def evaluate(model, sets, tmp_path, *more):
    """Evaluate with the command, with sets from a run's own YAML that has an interpolation."""
    file, out = tmp_path / "run.yaml", tmp_path / "out"
    shown = {**sets, "target": {**sets["target"], "loader": "${eval_loader}"}}
    run = {"eval_loader": sets["target"]["loader"], "callbacks": {"forgetting": {"sets": shown}}}
    file.write_text(yaml.safe_dump(run, sort_keys=False))
    code = main(["eval", str(model), "--sets", str(file), "--out", str(out), *map(str, more)])
    assert code == 0
    return json.loads((out / "evaluation.json").read_text())


@pytest.mark.parametrize("kind", ["hf", "checkpoint"])
@pytest.mark.parametrize("method", ["full", "dora"])
def test_figures_are_those_of_the_run(world, sets, trained, tmp_path, capsys, method, kind):
    evaluations, folder = trained(method)
    model = folder / "hf" if kind == "hf" else kit.checkpoint(folder, evaluations[-1]["step"])
    base = ["--base", world.base] if method == "full" else []  # an adapter names its own
    report = evaluate(model, sets, tmp_path, *base)
    first, last = evaluations[0], evaluations[-1]
    assert report["metrics"]["base"] == pytest.approx(first["metrics"], rel=1e-6)
    assert report["metrics"]["model"] == pytest.approx(last["metrics"], rel=1e-5)
    for role in ("learning", "forgetting"):
        assert report[role] == pytest.approx(last[role], rel=1e-3, abs=1e-6)
    assert report["metrics"]["base"]["source/kl"] == 0 < report["forgetting"]["source_kl"]
    table = capsys.readouterr().out
    assert "learning/target_loss" in table and f"{last['metrics']['source/kl']:.4f}" in table
    items = [json.loads(line) for line in (tmp_path / "out/items.jsonl").read_text().splitlines()]
    run_items = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    assert len(items) == len(run_items) and {item["step"] for item in items} == {0, 1}
    assert items[0]["loss"] == pytest.approx(run_items[0]["loss"], rel=1e-6)


@pytest.mark.parametrize("method", ["full", "dora"])
def test_states_of_the_base_need_not_be_kept(world, sets, trained, tmp_path, monkeypatch, method):
    """Without room for them the base model is computed again, with the adapter switched off."""
    monkeypatch.setattr(BaseStates, "limit", 0)
    evaluations, folder = trained(method)
    base = ["--base", world.base] if method == "full" else []
    report = evaluate(
        folder / "hf", {"source": sets["source"], "target": sets["target"]}, tmp_path, *base
    )
    expected = evaluations[-1]["metrics"]["source/kl"]
    assert report["metrics"]["model"]["source/kl"] == pytest.approx(expected, rel=1e-5)


def test_full_model_without_a_base(sets, trained, tmp_path, capsys):
    """Without a base there are figures, but no KL and no learning."""
    evaluations, folder = trained("full")
    report = evaluate(folder / "hf", sets, tmp_path)
    expected = dict(evaluations[-1]["metrics"])
    del expected["source/kl"]
    assert report["metrics"] == {"base": None, "model": pytest.approx(expected, rel=1e-5)}
    assert "learning" not in report and report["base"] is None
    assert "the base model is unknown: pass --base" in capsys.readouterr().out


def test_the_base_of_a_full_model_is_in_its_run_s_record(world, sets, trained, tmp_path):
    evaluations, folder = trained("full")
    shutil.copytree(folder / "hf", tmp_path / "run/hf")
    (tmp_path / "made").mkdir()
    made = write_run(tmp_path / "made", "full", 1e-2, 17, num_items=2)
    record = read_record(made / "record.json")
    record["config"] = {"model": {"pretrained_model_name_or_path": str(world.base)}}
    write_record(tmp_path / "run/record.json", record)
    report = evaluate(tmp_path / "run/hf", sets, tmp_path)
    assert report["base"] == str(world.base)
    assert report["learning"] == pytest.approx(evaluations[-1]["learning"], rel=1e-3, abs=1e-6)


def test_base_of_an_adapter_can_be_given(world, sets, trained, tmp_path):
    """`--base` replaces an adapter's own base that has moved."""
    evaluations, folder = trained("dora")
    adapter, base = tmp_path / "adapter", tmp_path / "moved"
    shutil.copytree(folder / "hf", adapter)
    shutil.copytree(world.base, base)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    report = evaluate(adapter, sets, tmp_path, "--base", base)
    assert report["metrics"]["model"] == pytest.approx(evaluations[-1]["metrics"], rel=1e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {}", "neither `sets` nor `callbacks.forgetting.sets`"),
        ("[", "while parsing"),
        ("sets: {a: {type: documents}}", "sets.a.role: missing"),
        ("sets: {a: '${nowhere}'}", "nowhere"),
    ],
)
def test_bad_files_are_one_line(tmp_path, capsys, text, message):
    (tmp_path / "sets.yaml").write_text(text)
    assert main(["eval", str(tmp_path), "--sets", str(tmp_path / "sets.yaml")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_bad_models_are_one_line(sets, tmp_path, capsys):
    (tmp_path / "sets.yaml").write_text(yaml.safe_dump({"sets": sets}))
    for model in (tmp_path, tmp_path / "nothing.pt"):
        assert main(["eval", str(model), "--sets", str(tmp_path / "sets.yaml")]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "neither adapter_config.json nor config.json" in first
    assert "nothing.pt does not exist" in second


# --- results of lm-evaluation-harness ------------------------------------------------------------

RESULTS = {
    "results": {
        "humaneval": {
            "alias": "humaneval",
            "pass@1,create_test": 0.125,
            "pass@1_stderr,create_test": 0.02,
        },
        "gsm8k": {
            "alias": "gsm8k",
            "exact_match,strict-match": 0.25,
            "exact_match_stderr,strict-match": "N/A",
            "exact_match,flexible-extract": 0.5,
        },
        "arc_challenge": {"alias": "arc", "acc,none": 0.3, "acc_norm,none": 0.35, "sample_len": 9},
    },
    "versions": {"gsm8k": 3.0},
}
FIGURES = {
    "lm_eval.humaneval/pass@1_create_test": 0.125,
    "lm_eval.gsm8k/exact_match_strict_match": 0.25,
    "lm_eval.gsm8k/exact_match_flexible_extract": 0.5,
    "lm_eval.arc_challenge/acc": 0.3,
    "lm_eval.arc_challenge/acc_norm": 0.35,
}


@pytest.fixture
def record(tmp_path):
    """Return a finished run's record with two evaluations."""
    environment = {
        **{"python": "3.11", "packages": {}, "commit": None, "dirty": None, "device": "x"},
        **{"device_kind": "cpu", "world_size": 1},
    }
    model = {
        **{"name": "x", "parameters": 1, "trainable_parameters": 1, "rank": None, "alpha": None},
        **{"effective_scale": None, "target_modules": None, "init": None},
    }
    train = {
        **{"name": None, "revision": None, "fingerprint": None, "documents": 1, "tokens": 1},
        "counts": {},
    }
    content = new_record(
        run_name="x",
        experiment="x",
        method="full",
        seed=1,
        learning_rate=0.1,
        config={},
        environment=environment,
        data={"train": train, "eval": {}},
        model=model,
    )
    content["status"] = "finished"
    content["ended"] = content["updated"]
    content["evaluations"] = [
        {"step": step, "real_tokens": 0, "metrics": {"a/loss": 1.0}, "learning": {}}
        | {"forgetting": {}}
        for step in (0, 5)
    ]
    path = tmp_path / "record.json"
    write_record(path, content)
    return path


def test_results_of_the_harness_enter_the_last_evaluation(record, tmp_path, capsys):
    results = tmp_path / "results.json"
    results.write_text(json.dumps(RESULTS))
    for _ in range(2):  # again replaces them
        assert main(["eval", str(record), "--lm-eval", str(results)]) == 0
    first, last = read_record(record)["evaluations"]
    assert first["metrics"] == {"a/loss": 1.0}
    assert last["metrics"] == {"a/loss": 1.0, **FIGURES}
    assert "lm_eval.humaneval/pass@1_create_test 0.1250" in capsys.readouterr().out


def test_results_that_cannot_enter(record, tmp_path, capsys):
    results = tmp_path / "results.json"
    for text, message in (
        ("{}", "must be a results_*.json"),
        ("no json", "must be a results_*.json"),
        ('{"results": {"x": {"alias": "x"}}}', "holds no figure"),
    ):
        results.write_text(text)
        assert main(["eval", str(record), "--lm-eval", str(results)]) == 2
        assert message in capsys.readouterr().err
    results.write_text(json.dumps(RESULTS))
    content = read_record(record)
    write_record(record, {**content, "status": "running", "ended": None})
    assert main(["eval", str(record), "--lm-eval", str(results)]) == 2
    write_record(record, {**content, "evaluations": []})
    assert main(["eval", str(record), "--lm-eval", str(results)]) == 2
    running, empty = capsys.readouterr().err.splitlines()
    assert "still running" in running and "no evaluation" in empty
