"""Rows, prose and chat answers of the experiment: disjoint, deterministic, no benchmark's text."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from foundry_ext.utils.errors import UserError

ROOT = Path(__file__).parents[3]
HERE = ROOT / "experiments/smollm2-135m-gsm8k"


@pytest.fixture
def benchmarks(tmp_path: Path) -> Path:
    """Return a folder with files of the benchmarks' forms, one in each place where they may be."""
    train, test = (
        [{"question": f"{how} {i}?", "answer": f"#### {i}"} for i in range(count)]
        for how, count in (("How much is", 1400), ("What is", 500))
    )
    questions = [
        {"query": f"Question: is it {i}?", "choices": ["a", "b"], "gold": 0} for i in range(200)
    ]
    schemas = [
        {"context_options": [f"{i} a", f"{i} b"], "continuation": "c", "gold": 1}
        for i in range(200)
    ]
    for name, rows in {
        "train/gsm8k_train": train,
        "eval/gsm8k_test": test,
        "eval/arc_challenge": questions,
        "winogrande": schemas,
    }.items():
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_rows_are_drawn_alike_and_slices_are_disjoint(modules, benchmarks: Path):
    data = modules["data"]
    files = data.find_files(benchmarks)
    rows = data.benchmark_rows(files)
    assert rows == data.benchmark_rows(files)

    def questions(name: str) -> set[str]:
        return {row["question"] for row in rows[f"gsm8k_{name}.jsonl"]}

    first, second = questions("train_1"), questions("train_2")
    assert len(first) == len(second) == data.SLICE_ROWS and not first & second
    assert len(questions("eval")) == data.EVAL_ROWS and not questions("eval") & questions(
        "problems"
    )
    assert len(rows["arc_challenge.jsonl"]) == data.ARC_ROWS
    assert all(row["query"].endswith("?\nAnswer:") for row in rows["arc_challenge.jsonl"])
    assert len(rows["winogrande.jsonl"]) == data.WINOGRANDE_ROWS


def test_a_file_that_is_missing_is_named_in_one_line(modules, benchmarks: Path):
    (benchmarks / "winogrande.jsonl").unlink()
    with pytest.raises(
        UserError, match=r"fetch winogrande\.jsonl \(.*DATA=FOLDER; with a hub"
    ) as it:
        modules["data"].find_files(benchmarks)
    assert "gsm8k" not in str(it.value) and "\n" not in str(it.value)


def test_without_data_the_command_says_what_to_fetch(tmp_path: Path):
    command = [sys.executable, str(HERE / "prepare.py"), ""]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("experiment: error: ")
    assert "grade-school-math" in done.stderr and "DATA=FOLDER" in done.stderr
    assert not list(tmp_path.iterdir())


def test_prose_is_sentences_and_none_is_both_measured_and_replayed(modules):
    data = modules["data"]
    measured, replayed = data.prose()
    texts = [row["text"] for row in (*measured, *replayed)]
    assert len(measured) == data.PROSE_DOCUMENTS and len(set(texts)) == len(texts)
    assert all(data.PROSE_WORDS <= len(text.split()) < 500 for text in texts)
    # Single paragraphs, too: topics quote one another.
    paragraphs = [{p for row in rows for p in row["text"].split("\n\n")} for rows in data.prose()]
    assert not paragraphs[0] & paragraphs[1]


def test_prompts_are_for_measuring_or_for_replay(modules):
    chat = modules["chat"]
    prompts = chat.read_prompts()
    assert len(set(prompts)) == len(prompts) == 48 and all(prompts)
    assert sum(map(chat.is_for_replay, range(48))) == 12


def test_noise_makes_the_greedy_choice_a_sample(modules):
    """Frequencies of 4000 choices are the distribution's, and a prompt's noise is its own."""
    logits = torch.tensor([0.1, 0.2, 0.7]).log() * modules["chat"].TEMPERATURE
    noise = modules["chat"]._Gumbel(2)
    choices = np.array([noise(None, logits.expand(2, 3)).argmax(-1).tolist() for _ in range(4000)])
    for column in choices.T:
        assert np.bincount(column) / 4000 == pytest.approx([0.1, 0.2, 0.7], abs=0.03)
    again = modules["chat"]._Gumbel(1)
    assert choices[:50, 0].tolist() == [int(again(None, logits[None]).argmax()) for _ in range(50)]


def test_the_hub_is_one_setting_of_the_same_sweep(modules, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(modules["run"], "SWEEPS", tmp_path)
    local = HERE / "stage-a.yaml"
    before, after = (
        yaml.safe_load(path.read_text()) for path in (local, modules["run"].with_hub(local))
    )
    assert after["parameters"].pop("variables.weights") == {"value": "hub"}
    assert after.pop("name") != before.pop("name") and after == before


def test_no_record_holds_text_of_a_benchmark():
    """Kept items are names and numbers."""
    for path in (HERE / "results/runs").glob("*/items.jsonl"):
        for line in path.read_text().splitlines():
            item = json.loads(line)
            texts = {key for key, value in item.items() if isinstance(value, str)}
            assert texts <= {"set", "item"}, path
