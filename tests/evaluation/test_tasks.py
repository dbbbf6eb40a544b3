"""Tasks made of rows in the hub's schema: the harness's wording, readable by llm-foundry."""

import json
import re
from types import SimpleNamespace

import pytest

from foundry_ext.cli.main import main
from foundry_ext.evaluation import tasks
from foundry_ext.evaluation.config import parse_sets
from foundry_ext.evaluation.measure import build_sets

# The columns of each dataset on the hub; the text is made up.
HELLASWAG = [
    {
        "ind": 24,
        "activity_label": "Roof shingle removal",
        "ctx_a": "A man is sitting on a roof.",
        "ctx_b": "he",
        "ctx": "A man is sitting on a roof. he",
        "endings": ["is using wrap.", " pulls tiles  off.", "holds a cube.", "sings."],
        "source_id": "activitynet~v_x",
        "split": "val",
        "split_type": "indomain",
        "label": "1",
    },
    {
        "ind": 25,
        "activity_label": "Cutting Keys",
        "ctx_a": "[header] How to cut a key [title] Take a blank. [step] Look at it  twice.",
        "ctx_b": "",
        "ctx": "unused",
        "endings": ["[title] Cut it.", "Wait [substeps] an hour.", "Go.", "Stop."],
        "source_id": "wikihow~1",
        "split": "val",
        "split_type": "zeroshot",
        "label": "3",
    },
]
ARC = [
    {
        "id": "Mercury_1",
        "question": "What falls?",
        "choices": {"text": ["a stone", "light", "sound", "fire"], "label": ["A", "B", "C", "D"]},
        "answerKey": "A",
    },
    {
        "id": "NY_2",
        "question": "What burns?",
        "choices": {"text": ["wood", "iron", "water", "sand"], "label": ["1", "2", "3", "4"]},
        "answerKey": "1",
    },
]
WINOGRANDE = [
    {
        "sentence": "Ann thanked Eva because _ had helped her.",
        "option1": "Ann",
        "option2": "Eva",
        "answer": "2",
    }
] * 2
GSM8K = [
    {
        "question": "Ada has 1200 coins and finds 34. How many?",
        "answer": "1200 + 34 = <<1200+34=1234>>1234\n#### 1,234",
    },
    {"question": "Two and two?", "answer": "It is 2 + 2 = 4.\n#### 4"},
]
ROWS = {"hellaswag": HELLASWAG, "arc_challenge": ARC, "winogrande": WINOGRANDE, "gsm8k": GSM8K}

EXPECTED = {
    "hellaswag": {
        "query": "Roof shingle removal: A man is sitting on a roof. He",
        "choices": ["is using wrap.", "pulls tiles off.", "holds a cube.", "sings."],
        "gold": 1,
    },
    "arc_challenge": {
        "query": "Question: What falls?\nAnswer:",
        "choices": ["a stone", "light", "sound", "fire"],
        "gold": 0,
    },
    "winogrande": {
        "context_options": ["Ann thanked Eva because Ann", "Ann thanked Eva because Eva"],
        "continuation": "had helped her.",
        "gold": 1,
    },
    "gsm8k": {
        "context": "Question: Ada has 1200 coins and finds 34. How many?\nAnswer:",
        "answer": "1,234",
        "aliases": ["1,234", "1234"],
        "chain_of_thought": "1200 + 34 = <<1200+34=1234>>1234",
    },
}


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def written(tmp_path, write_jsonl, capsys):
    """Return a function that writes a task of ROWS by the command."""

    def write(name):
        source, out = write_jsonl(ROWS[name], f"{name}.hub.jsonl"), tmp_path / f"{name}.jsonl"
        assert main(["tasks", name, str(out), "--source", str(source)]) == 0
        assert "2 rows" in capsys.readouterr().out
        return out

    return write


@pytest.mark.parametrize("name", list(ROWS))
def test_rows(written, name):
    out = written(name)
    rows = read(out)
    assert rows[0] == EXPECTED[name] and len(rows) == 2
    origin = json.loads((out.parent / f"{name}.jsonl.source.json").read_text())
    assert (origin["source"], origin["rows"]) == (f"{name}.hub.jsonl", 2)


def test_marks_of_wikihow(written):
    row = read(written("hellaswag"))[1]
    assert row["query"] == "Cutting Keys: How to cut a key. Take a blank. Look at it twice."
    assert row["choices"][:2] == [" Cut it.", "Wait an hour."]


@pytest.mark.parametrize("name", list(ROWS))
def test_our_evaluation_reads_it(written, tokenizer, name):
    kind = "generation" if name == "gsm8k" else "multiple_choice"
    keys = {"role": "forgetting", "type": kind, "path": str(written(name)), "num_fewshot": 1}
    (built,) = build_sets(parse_sets({name: keys}), tokenizer, 1000)
    assert built.description["documents"] == 2


@pytest.mark.parametrize("name", list(ROWS))
def test_llm_foundry_reads_it(written, tokenizer, tmp_path, name):
    """llm-foundry's own reader finds the same choices and the same gold ones."""
    from llmfoundry.eval.datasets.in_context_learning_evaluation import get_icl_task_dataloader

    out = written(name)
    more = {"cot_delimiter": "\n#### "} if name == "gsm8k" else {}
    spec = get_icl_task_dataloader(
        tasks.TASKS[name].icl_task_type,
        str(out),
        tokenizer,
        8,
        destination_path=str(tmp_path / "copy.jsonl"),
        kwargs={
            "max_seq_len": 700,
            "pad_tok_id": tokenizer.pad_token_id,
            "num_fewshot": 1,
            "prompt_string": "",
            **more,
        },
    )
    (batch,) = spec.dataloader
    texts = [tokenizer.decode(ids) for ids in batch["input_ids"]]
    rows = read(out)
    if name == "gsm8k":
        assert [set(labels) for labels in batch["labels"]] == [{"1,234", "1234"}, {"4"}]
        assert ROWS[name][1]["answer"] in texts[0], "the solved example, in GSM8K's own words"
        return
    assert batch["gold_indices"] == [row["gold"] for row in rows]
    spans = [
        tokenizer.decode(ids[span[0] : span[-1] + 1]).strip()
        for ids, span in zip(batch["input_ids"], batch["continuation_indices"], strict=True)
    ]
    if name == "winogrande":
        assert spans == ["had helped her."] * 4
        assert all(row["context_options"][0] in texts[0] for row in rows[:1])
    else:
        assert spans == [choice.strip() for row in rows for choice in row["choices"]]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("arc_challenge", {"answerKey": ""}, "row 1 is not labelled"),
        ("hellaswag", {"label": ""}, "row 1 is not labelled"),
        ("winogrande", {"answer": ""}, "row 1 is not labelled"),
        ("winogrande", {"sentence": "no gap"}, "row 1 is not labelled .*no gap"),
        ("gsm8k", {"answer": "4"}, "row 1 is not labelled .*the answer has no '#### '"),
        ("gsm8k", {"question": None}, "row 1 has no column 'question'"),
    ],
)
def test_rows_of_another_schema_are_named(write_jsonl, tmp_path, name, change, message, capsys):
    bad = {key: value for key, value in {**ROWS[name][1], **change}.items() if value is not None}
    source = write_jsonl([ROWS[name][0], bad])
    out = tmp_path / "out.jsonl"
    assert main(["tasks", name, str(out), "--source", str(source)]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not out.exists()


def test_unknown_task_or_file(tmp_path, capsys):
    out = str(tmp_path / "out.jsonl")
    assert main(["tasks", "piqa", out]) == 2
    assert main(["tasks", "gsm8k", out, "--source", "nowhere.jsonl"]) == 2
    assert main(["tasks", "gsm8k", out, "--source", "x", "--revision", "main"]) == 2
    error = capsys.readouterr().err
    assert "'piqa' is unknown; choose one of hellaswag" in error
    assert "nowhere.jsonl does not exist" in error and "leave them out" in error


def test_hub_rows_are_those_of_the_recorded_commit(tmp_path, monkeypatch):
    """A branch moves, so rows are loaded by its present commit, which is recorded."""
    import datasets
    import huggingface_hub

    calls = []

    class Api:
        def dataset_info(self, name, revision):
            calls.append((name, revision))
            return SimpleNamespace(sha="abc123")

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return ARC

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    out = tmp_path / "arc.jsonl"
    assert main(["tasks", "arc_challenge", str(out), "--revision", "v1"]) == 0
    assert calls == [
        ("allenai/ai2_arc", "v1"),
        (
            ("allenai/ai2_arc", "ARC-Challenge"),
            {"split": "test", "revision": "abc123", "trust_remote_code": False},
        ),
    ]
    origin = json.loads(tasks.source_file(out).read_text())
    assert (origin["source"], origin["split"]) == ("allenai/ai2_arc", "test")
    assert origin["revision"] == "abc123"
