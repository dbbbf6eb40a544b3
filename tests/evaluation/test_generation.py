"""GSM8K by generation: the harness's extraction, and the same answers as unpadded generation."""

import json

import pytest
import torch
from transformers import LlamaConfig

from foundry_ext.evaluation import generation
from foundry_ext.evaluation.config import GenerationSetConfig
from foundry_ext.evaluation.generation import (
    flexible_extract,
    generate,
    normalise,
    output_text,
    strict_extract,
)
from foundry_ext.evaluation.measure import build_sets, measure
from foundry_ext.evaluation.scoring import Shard
from foundry_ext.models.smollm2 import SmolLM2ForCausalLM
from foundry_ext.utils import progress

ROWS = [
    {"question": "one bird and two", "answer": "count one\n#### 1,234"},
    {"question": "seven", "answer": "because 12\n#### 7"},
    {"question": "the river of light slowly count 3.5 one two", "answer": "#### -3"},
]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=72,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=400,
        initializer_range=0.4,
        eos_token_id=5,
        bos_token_id=0,
    )
    return SmolLM2ForCausalLM(config).eval()


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "task.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def build(path, tokenizer, max_length=400, **settings):
    parsed = GenerationSetConfig(name="gsm8k", role="learning", path=path, **settings)
    return build_sets([parsed], tokenizer, max_length)


@pytest.mark.parametrize(
    ("output", "strict", "flexible"),
    [
        (" 9 + 9 = 18\n#### 18", "18", "18"),
        ("#### 1,234.50 and #### 7", "1,234.50", "7"),
        ("it costs $1,234.", "[invalid]", "$1,234."),
        ("#### -5 or 6", "-5", "6"),
        ("####18", "[invalid]", "18"),
        ("no number", "[invalid]", "[invalid]"),
        ("so 3.", "[invalid]", "3."),
        ("7 ...", "[invalid]", "..."),
        ("", "[invalid]", "[invalid]"),
    ],
)
def test_extraction(output, strict, flexible):
    """Strict takes the first number after the mark, flexible the last run of digits.

    Dots, commas and dollar signs count as digits in a run of two or more.
    """
    assert strict_extract(output) == strict
    assert flexible_extract(output) == flexible


@pytest.mark.parametrize(
    ("text", "compared"),
    [
        ("$1,234.", "1234"),
        ("reasoning\n#### 2\nmore\n#### 18", "18"),
        ("3.50", "3.50"),
        ("[INVALID]", "[invalid]"),
    ],
)
def test_what_is_compared(text, compared):
    assert normalise(text) == compared


def test_stop_strings_cut_the_output():
    assert output_text(" 18\n\nQuestion: What?<|im_end|>") == " 18\n\n"
    assert output_text("x</s>Question:") == "x"


def test_generation_is_that_of_single_prompts(model, tokenizer):
    """Neither left padding nor the model's own sampling settings change the answers."""
    prompts = [tokenizer(text)["input_ids"] for text in ("one", "the river of light", "12 bird")]
    model.generation_config.do_sample, model.generation_config.temperature = True, 9.0
    outputs = generate(model, tokenizer, prompts, 12)
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = list(prompt)
        while len(ids) < len(prompt) + 12:
            pack = {
                "input_ids": torch.tensor([ids]),
                "position_ids": torch.arange(len(ids))[None],
                "cu_seqlens": torch.tensor([0, len(ids)], dtype=torch.int32),
                "max_seqlen": 400,
            }
            with torch.no_grad():
                ids.append(int(model(**pack).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        text = tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
        assert output == output_text(text) != ""


def test_generation_ends_at_a_stop_string(model, tokenizer, monkeypatch):
    """A row that has stopped is left out, and the others go on."""
    prompts = [tokenizer(text)["input_ids"] for text in ("one", "the river of light")]
    free = generate(model, tokenizer, prompts, 20)
    stop = free[0][3:5]
    monkeypatch.setattr(generation, "STOP_STRINGS", (stop,))
    steps = []
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *a: (steps.append(1), forward(*a))[1])
    assert generate(model, tokenizer, prompts[:1], 20) == [free[0].split(stop)[0]]
    assert len(steps) < 20
    both = generate(model, tokenizer, prompts, 20)
    assert both == [text.split(stop)[0] for text in free]


def test_items(model, tokenizer, path, monkeypatch):
    """One answer is right, one wrong, one right by the flexible match only."""
    answers = {"bird": " count\n#### 1,234\n", "seven": " 12 or $7.00 or 7.", "river": " 3"}

    def answer(_model, tokenizer, prompts, _max_new_tokens):
        last = [tokenizer.decode(prompt).rpartition("Question:")[2] for prompt in prompts]
        return [next(a for word, a in answers.items() if word in text) for text in last]

    monkeypatch.setattr(generation, "generate", answer)
    metrics, items = measure(build(path, tokenizer, num_fewshot=1), model, None)
    assert [item["gold"] for item in items] == ["1234", "7", "-3"]
    assert [item["strict_match"] for item in items] == [1, 0, 0]
    assert [item["flexible_extract"] for item in items] == [1, 1, 0]
    assert metrics == {"gsm8k/strict_match": 1 / 3, "gsm8k/flexible_extract": 2 / 3}
    assert items[1] == {
        **{"set": "gsm8k", "item": "1", "gold": "7", "output": answers["seven"]},
        **{"strict_match": 0, "flexible_extract": 1},
    }


def test_prompts(tokenizer, path):
    """Prompts are the harness's few-shot ones, cut from the left if the answer needs the room."""
    (built,) = build(path, tokenizer, num_fewshot=1, max_items=1)
    text = tokenizer.decode(built.prompts[0])
    example, question = text.split("\n\n")
    assert question == "Question: one bird and two\nAnswer:"
    row = ROWS[1] if "seven" in example else ROWS[2]
    assert example == f"Question: {row['question']}\nAnswer: {row['answer']}"
    (cut,) = build(path, tokenizer, num_fewshot=1, max_new_tokens=390)
    assert {len(prompt) for prompt in cut.prompts} == {10}
    assert all(tokenizer.decode(prompt).endswith("Answer:") for prompt in cut.prompts)
    assert cut.description["counts"] == {"kept": 0, "truncated": 3}


def test_an_empty_prompt_begins_as_a_text_does(model, tokenizer, tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text(json.dumps({"context": "", "answer": "3", "aliases": []}) + "\n")
    (built,) = build(str(path), tokenizer, num_fewshot=0)
    assert built.prompts == [[tokenizer.bos_token_id]]
    assert len(generate(model, tokenizer, built.prompts, 3)) == 1


def test_rows_of_llm_foundry_are_the_same_task(tokenizer, path, tmp_path):
    """Rows as `foundry-ext tasks` writes them keep the reasoning apart from the answer."""
    rows = []
    for row in ROWS:
        reasoning, _, answer = row["answer"].rpartition("#### ")
        rows.append(
            {
                "context": f"Question: {row['question']}\nAnswer:",
                "answer": answer,
                "aliases": [answer],
                "chain_of_thought": reasoning.strip(),
            }
        )
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (ours,), (theirs,) = (
        build(str(file), tokenizer, num_fewshot=2, max_items=2) for file in (other, path)
    )
    assert [problem.golds for problem in ours.questions] == [("1234",), ("-3",)]
    assert [p.golds for p in ours.questions] == [p.golds for p in theirs.questions]
    # The third row has no reasoning, so no line break before its mark.
    assert tokenizer.decode(ours.prompts[0]).count("#### 7") == 1
    assert ours.prompts[1] == theirs.prompts[1]


def test_batches_and_ranks_change_nothing(model, tokenizer, path, monkeypatch, capsys):
    (built,) = build(path, tokenizer, num_fewshot=0, max_new_tokens=6)
    whole = built.complete(built.measure(model, None, Shard()))
    monkeypatch.setattr(generation, "BATCH_SIZE", 1)
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    parts = [built.measure(model, None, Shard(rank, 2)) for rank in range(2)]
    lines = capsys.readouterr().err.splitlines()  # of the first rank
    assert lines and all(f"{built.config.name}: " in line and "/2" in line for line in lines)
    assert [len(part) for part in parts] == [2, 1]
    assert built.complete(parts[0] + parts[1]) == whole


def test_other_rows_are_refused(tokenizer, tmp_path):
    path = tmp_path / "task.jsonl"
    path.write_text('{"query": "x"}\n')
    with pytest.raises(ValueError, match="row 0: keys query; a generation row has question"):
        build(str(path), tokenizer)
    path.write_text("{}\nno json\n")
    with pytest.raises(ValueError, match="line 2: not JSON"):
        build(str(path), tokenizer)
