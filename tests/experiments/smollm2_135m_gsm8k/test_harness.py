"""The comparison with lm-evaluation-harness: its figures are those of its items, and no text."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from foundry_ext.utils.errors import UserError

ROOT = Path(__file__).parents[3]
HERE = ROOT / "experiments/smollm2-135m-gsm8k/harness"


@pytest.fixture(scope="module")
def compare() -> Any:
    spec = importlib.util.spec_from_file_location("compare_harness", HERE / "compare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def items() -> list[dict[str, Any]]:
    lines = (HERE / "items.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_readme_and_the_results_are_those_of_the_items(compare, items):
    summary = compare.summarise(items)
    results = json.loads((HERE / "results.json").read_text(encoding="utf-8"))
    assert summary.items() <= results.items()
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    assert "\n".join(compare.tables(summary)) in readme


def test_items_are_all_items_and_numbers(items):
    for name, count in (("arc_challenge", 1172), ("winogrande", 1267)):
        assert [i["item"] for i in items if i["set"] == name] == list(range(count))
    for item in items:
        texts = {key for key, value in item.items() if isinstance(value, str)}
        numbers = [*item["characters"], *item["ours"], *item["harness"]]
        assert texts == {"set"} and all(isinstance(number, int | float) for number in numbers)


def test_the_runs_measure_the_base_as_the_harness_does(modules, items):
    """Each run measured the base model at step 0, on items drawn from all."""
    data = modules["data"]
    runs = sorted((HERE.parent / "results/runs").glob("*/items.jsonl"))
    assert runs
    for path in runs:
        measured = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for name, count in (("arc_challenge", data.ARC_ROWS), ("winogrande", data.WINOGRANDE_ROWS)):
            base = [item for item in measured if item["set"] == name and item["step"] == 0]
            drawn = data._draw([item for item in items if item["set"] == name], count)
            assert [item["gold"] for item in base] == [item["gold"] for item in drawn]
            for ours, theirs in zip(base, drawn, strict=True):
                assert ours["logprobs"] == pytest.approx(theirs["harness"], abs=1e-4), path


def test_another_choice_is_counted_by_sum_and_by_character(compare):
    def item(name: str, ours: list[float], harness: list[float]) -> dict[str, Any]:
        known = {"set": name, "item": 0, "gold": 1, "characters": [2, 8]}
        return {**known, "ours": ours, "harness": harness}

    summary = compare.summarise(
        [
            item("arc_challenge", [-4.0, -3.0], [-4.0, -4.5]),  # per character: -2, -0.4; -2, -0.6
            item("winogrande", [-1.0, -2.0], [-1.0, -2.0]),
        ]
    )
    arc, winogrande = summary["arc_challenge"], summary["winogrande"]
    assert (arc["largest_difference"], arc["mean_difference"]) == (1.5, 0.75)
    assert (arc["acc"]["ours"], arc["acc"]["harness"], arc["acc"]["differing_choices"]) == (1, 0, 1)
    assert arc["acc_norm"]["harness"] == 1 and arc["acc_norm"]["differing_choices"] == 0
    assert arc["acc"]["smallest_margin"] == 0.5
    assert arc["acc"]["ties"] == 0
    assert winogrande["acc"]["ours"] == winogrande["largest_difference"] == 0


def test_rows_are_worded_as_in_the_runs_and_read_by_both_tools(compare, modules, tmp_path):
    row = {"query": "Question: is it so?", "choices": ["a", "b"], "gold": 0}
    assert compare.with_answer(row) == modules["data"]._with_answer(row)
    assert compare.with_answer({"continuation": "c"}) == {"continuation": "c"}
    sets = yaml.safe_load((HERE / "sets.yaml").read_text(encoding="utf-8"))["sets"]
    for name in compare.METRICS:
        assert Path(sets[name]["path"]) == compare.OUT / f"ours/{name}.jsonl"
        task = yaml.safe_load((HERE / f"tasks/{name}_local.yaml").read_text(encoding="utf-8"))
        (path,) = task["dataset_kwargs"]["data_files"].values()
        assert Path(path) == compare.OUT / f"rows/{name}.jsonl" and task["num_fewshot"] == 0


def test_results_of_another_model_are_not_taken(compare, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "OUT", tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"1")
    assert compare.check_inputs(tmp_path) == compare.check_inputs(tmp_path)
    weights.write_bytes(b"2")
    with pytest.raises(UserError, match="remove it"):
        compare.check_inputs(tmp_path)
