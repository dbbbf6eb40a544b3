"""The YAMLs of yamls/eval on tasks with the hub's schema: ours and llm-foundry's evaluation."""

import itertools
import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from foundry_ext.evaluation.config import parse_sets
from foundry_ext.evaluation.tasks import write_task
from tests.evaluation.test_tasks import ROWS
from tests.training import kit

EVAL = Path(__file__).parents[2] / "yamls/eval"


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """Write data/tasks in the current folder, with eight rows per task."""
    for name, rows in ROWS.items():
        source = tmp_path / "hub.jsonl"
        eight = list(itertools.islice(itertools.cycle(rows), 8))
        if name == "arc_challenge":  # a few of the hub's have three or five choices
            for at, texts in ((3, list("abc")), (5, list("abcde"))):
                choices = {"text": texts, "label": list("ABCDE")[: len(texts)]}
                eight[at] = {**eight[at], "choices": choices, "answerKey": "A"}
        source.write_text("".join(json.dumps(row) + "\n" for row in eight))
        write_task(name, tmp_path / f"data/tasks/{name}.jsonl", source=source)
    monkeypatch.chdir(tmp_path)


def test_sets_are_valid(tasks):
    sets = OmegaConf.to_container(OmegaConf.load(EVAL / "forgetting.yaml"))
    parsed = parse_sets(sets["sets"])  # pyright: ignore
    assert {one.name for one in parsed} == {"source", *ROWS}
    # `...sets.hellaswag=null` on the command line takes a set out.
    fewer = parse_sets({**sets["sets"], "hellaswag": None})  # pyright: ignore
    assert [one.name for one in fewer] == [one.name for one in parsed if one.name != "hellaswag"]


def test_llm_foundry_evaluates_the_packed_model(tasks, tmp_path, tokenizer):
    """Every task gives an accuracy, with train metrics off and logits of padded batches. (29)"""
    from llmfoundry.command_utils.eval import evaluate

    base = tmp_path / "base"
    kit.make_llama(max_position_embeddings=1200).save_pretrained(base)
    tokenizer.save_pretrained(base)
    config = OmegaConf.load(EVAL / "llmfoundry.yaml")
    config.variables.model = str(base)
    config.precision = "fp32"
    config.icl_tasks[3].max_seq_len = 1100
    config.icl_tasks[3].generation_kwargs.max_new_tokens = 4
    ((trainer,), _) = evaluate(config)  # pyright: ignore
    found = {
        f"{label}/{name}": float(metric.compute())
        for label, metrics in trainer.state.eval_metrics.items()
        for name, metric in metrics.items()
    }
    accuracy = "InContextLearningMultipleChoiceAccuracy"
    assert set(found) == {
        *(f"{name}/0-shot/{accuracy}" for name in ("hellaswag", "arc_challenge", "winogrande")),
        "gsm8k/5-shot/InContextLearningGenerationExactMatchAccuracy",
    }
    assert all(0 <= value <= 1 for value in found.values())
    assert found[f"winogrande/0-shot/{accuracy}"] in (0, 1), "eight times one question"
