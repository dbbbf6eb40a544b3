"""Multiple choice: log-probabilities equal those of full logits, packed, padded or one by one."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import foundry_ext.models
from foundry_ext.evaluation import multiple_choice
from foundry_ext.evaluation.config import MultipleChoiceSetConfig
from foundry_ext.evaluation.measure import build_sets, measure
from foundry_ext.evaluation.metrics import changes
from foundry_ext.evaluation.scoring import Shard
from foundry_ext.models.smollm2 import SmolLM2ForCausalLM
from foundry_ext.utils import progress
from tests.conftest import WORDS

SHARED = Path(__file__).parents[3] / "shared/data/eval"
CONFIGS = Path(foundry_ext.models.__file__).parent / "configs"
MAX_LENGTH = 200


@pytest.fixture(scope="module")
def models():
    """Return (ours, theirs) with SmolLM2-135M's 9 query and 3 key/value heads, but two layers."""
    config = LlamaConfig.from_pretrained(CONFIGS / "smollm2-135m")
    small = {"hidden_size": 72, "head_dim": 8, "intermediate_size": 96, "num_hidden_layers": 2}
    for key, value in (small | {"vocab_size": 320, "initializer_range": 0.2}).items():
        setattr(config, key, value)
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(config).eval()
    ours = SmolLM2ForCausalLM(config)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.fixture
def write(tmp_path):
    def write(rows):
        path = tmp_path / "task.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def generated(count, seed=0):
    """Return rows of both forms, with choices of unequal length and number, and trailing spaces."""
    rng = random.Random(seed)

    def words(most):
        return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))

    rows = []
    for number in range(count):
        if number % 3 == 2:
            options = [f"{words(9)} {name}" for name in ("bird", "stone")]
            rows.append({"context_options": options, "continuation": words(5), "gold": number % 2})
        else:
            choices = [words(6) for _ in range(rng.randint(2, 5))]
            query = f"{words(12)}{' ' * (number % 2)}"
            rows.append({"query": query, "choices": choices, "gold": len(choices) - 1})
    return rows


def evaluate(model, path, tokenizer, max_length=MAX_LENGTH, shard=None, **settings):
    parsed = [MultipleChoiceSetConfig(name="task", role="forgetting", path=path, **settings)]
    (built,) = sets = build_sets(parsed, tokenizer, max_length)
    if shard is not None:
        return built.measure(model.eval(), None, shard)
    metrics, items = measure(sets, model, None)
    return metrics, items, built


@torch.no_grad()
def directly(theirs, tokenizer, context, continuation):
    """Return the summed log-probability of the continuation from one sequence's logits."""
    ids = tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
    start = len(tokenizer(context.rstrip(), add_special_tokens=False)["input_ids"])
    log_probs = theirs(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(log_probs[position - 1, ids[position]].item() for position in range(start, len(ids)))


def expected(theirs, tokenizer, row):
    if "query" in row:
        pairs = [(row["query"], f" {choice}") for choice in row["choices"]]
        lengths = [len(choice) for choice in row["choices"]]
    else:
        pairs = [(context, f" {row['continuation']}") for context in row["context_options"]]
        lengths = [len(row["continuation"])] * len(pairs)
    return [directly(theirs, tokenizer, *pair) for pair in pairs], lengths


def assert_as_from_logits(items, rows, theirs, tokenizer):
    for item in items:
        row = rows[int(item["item"])]
        sums, lengths = expected(theirs, tokenizer, row)
        assert item["logprobs"] == pytest.approx(sums, rel=2e-5, abs=2e-5)
        normed = [value / length for value, length in zip(sums, lengths, strict=True)]
        assert item["logprobs_norm"] == pytest.approx(normed, rel=2e-5)
        assert item["gold"] == row["gold"]
        assert item["acc"] == (np.argmax(sums) == row["gold"])
        assert item["acc_norm"] == (np.argmax(normed) == row["gold"])


def test_generated_items_are_those_of_the_logits(models, tokenizer, write):
    ours, theirs = models
    rows = generated(40)
    metrics, items, _ = evaluate(ours, write(rows), tokenizer)
    assert [item["item"] for item in items] == [str(number) for number in range(40)]
    assert_as_from_logits(items, rows, theirs, tokenizer)
    for name in ("acc", "acc_norm"):
        assert metrics[f"task/{name}"] == sum(item[name] for item in items) / 40
        assert 0 < metrics[f"task/{name}"] < 1
    assert any(item["acc"] != item["acc_norm"] for item in items)


@pytest.mark.parametrize("name", ["arc_challenge", "winogrande"])
def test_shared_items_are_those_of_the_logits(models, tokenizer, name):
    """Log-probabilities are those of the logits, on 60 real questions of each file."""
    path = SHARED / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path.name} beside the project")
    ours, theirs = models
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    _, items, built = evaluate(ours, str(path), tokenizer, max_length=1000, max_items=60)
    assert len(items) == 60 and built.num_truncated == 0
    assert items[-1]["item"] == str(len(rows) - 1), "evenly spaced over the file"
    assert_as_from_logits(items, rows, theirs, tokenizer)


@pytest.mark.parametrize("pack_tokens", [1, 64, 8192])
def test_any_batch_size_gives_the_same(models, tokenizer, write, monkeypatch, pack_tokens):
    """Packs may hold one document (1 is raised to the longest), a few, or all."""
    monkeypatch.setattr(multiple_choice, "PACK_TOKENS", pack_tokens)
    ours, theirs = models
    rows = generated(12, seed=4)
    _, items, _ = evaluate(ours, write(rows), tokenizer)
    assert_as_from_logits(items, rows, theirs, tokenizer)


@torch.no_grad()
def test_padded_batch_gives_the_same(models, tokenizer, write):
    """Our padded forward pass, which llm-foundry's in-context tasks use, gives the same."""
    ours, _ = models
    rows = [row for row in generated(9, seed=2) if "query" in row]
    _, items, built = evaluate(ours, write(rows), tokenizer)
    documents = built.documents
    width = max(len(document.input_ids) for document in documents)
    ids = torch.zeros(len(documents), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, document in enumerate(documents):
        ids[row, : len(document.input_ids)] = torch.tensor(document.input_ids)
        mask[row, : len(document.input_ids)] = 1
    log_probs = ours.eval()(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
    sums = []
    for row, document in enumerate(documents):
        positions = document.loss_mask.nonzero()[0]
        sums.append(sum(log_probs[row, p - 1, ids[row, p]].item() for p in positions))
    assert [x for item in items for x in item["logprobs"]] == pytest.approx(sums, rel=2e-5)


def test_ranks_share_the_choices(models, tokenizer, write, monkeypatch):
    monkeypatch.setattr(multiple_choice, "PACK_TOKENS", 64)
    ours, _ = models
    path = write(generated(9))
    whole = evaluate(ours, path, tokenizer, shard=Shard())
    parts = [evaluate(ours, path, tokenizer, shard=Shard(rank, 3)) for rank in range(3)]
    assert all(parts) and sum(map(len, parts)) == len(whole)
    together = [str(item) for part in parts for item in part]
    assert sorted(together) == sorted(map(str, whole))


def test_the_first_rank_shows_progress(models, tokenizer, write, monkeypatch, capsys):
    monkeypatch.setattr(multiple_choice, "PACK_TOKENS", 64)
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    path = write(generated(9))
    evaluate(models[0], path, tokenizer, shard=Shard(1, 2))
    assert capsys.readouterr().err == ""
    evaluate(models[0], path, tokenizer)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 1 and all("task" in line and "packs" in line for line in lines)


def test_few_shot_prompts(tokenizer, write):
    """Other rows stand before the question with their gold answers, drawn by the item alone."""
    rows = [
        {"query": f"one {word}", "choices": [f"wrong {word}", f"right {word}"], "gold": 1}
        for word in ("bird", "stone", "river")
    ]
    settings = MultipleChoiceSetConfig(
        name="task", role="learning", path=write(rows), num_fewshot=2, max_items=2
    )
    (built,) = build_sets([settings], tokenizer, MAX_LENGTH)
    texts = [tokenizer.decode(document.input_ids) for document in built.documents]
    assert texts[2].endswith("\n\none river wrong river") and len(texts) == 4
    examples = {"one bird right bird", "one stone right stone"}
    assert set(texts[2].split("\n\n")[:2]) == examples
    labels = [tokenizer.decode(d.input_ids[d.loss_mask]) for d in built.documents]
    assert labels == [" wrong bird", " right bird", " wrong river", " right river"]


def test_spaces_at_the_end_of_the_context_are_scored(tokenizer):
    """Trailing spaces are scored, as in the harness: they belong to the next word's token."""
    (document,), _ = multiple_choice.encode(tokenizer, [("one two \n", " bird")], max_length=50)
    assert tokenizer.decode(document.input_ids[document.loss_mask]) == " \n bird"


def test_empty_context_is_the_start_token(models, tokenizer, write):
    ours, theirs = models
    rows = [{"query": "", "choices": ["one bird", "the"], "gold": 0}]
    _, (item,), _ = evaluate(ours, write(rows), tokenizer)
    sums = [directly_after(theirs, tokenizer, text) for text in (" one bird", " the")]
    assert item["logprobs"] == pytest.approx(sums, rel=2e-5)


@torch.no_grad()
def directly_after(theirs, tokenizer, text):
    ids = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
    log_probs = theirs(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(log_probs[place - 1, ids[place]].item() for place in range(1, len(ids)))


@torch.no_grad()
def test_overlong_contexts_are_cut_from_the_left(models, tokenizer, write, caplog):
    """The model reads max_length tokens and predicts one more; truncation is counted and logged."""
    ours, theirs = models
    rows = [
        {"query": "bird " * 30, "choices": ["stone", "river of light"], "gold": 0},
        {"query": "bird", "choices": ["stone"], "gold": 0},
    ]
    with caplog.at_level("WARNING"):
        _, items, built = evaluate(ours, write(rows), tokenizer, max_length=12)
    assert built.num_truncated == 2 == built.description["counts"]["truncated"]
    assert "2 of 3 choices exceed 12 tokens" in caplog.text
    ids = tokenizer("bird " * 29 + "bird  stone")["input_ids"][-13:]
    labels = len(tokenizer("  stone")["input_ids"])
    log_probs = theirs(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
    scored = range(len(ids) - labels, len(ids))
    value = sum(log_probs[place - 1, ids[place]].item() for place in scored)
    assert items[0]["logprobs"][0] == pytest.approx(value, rel=2e-5)


def test_truncated_choices_share_what_is_equal(models, tokenizer, write):
    """Choices of unequal lengths are cut at different tokens, which have different positions."""
    ours, theirs = models
    choices = ["stone", "river", "river of light", "stone of light"]
    rows = [{"query": "bird one two " * 9, "choices": choices, "gold": 0} for _ in range(2)]
    rows.append({"query": "bird one", "choices": choices, "gold": 0})
    _, items, built = evaluate(ours, write(rows), tokenizer, max_length=20)
    assert built.num_truncated == 8 and len(built.forest.trees) < 12, (
        "some are cut, some still share"
    )
    for item, first in zip(items, (0, 4, 8), strict=True):
        sums = [directly_labelled(theirs, one) for one in built.documents[first : first + 4]]
        assert item["logprobs"] == pytest.approx(sums, rel=2e-5)


@torch.no_grad()
def directly_labelled(theirs, document):
    ids = torch.from_numpy(document.input_ids)[None]
    log_probs = theirs(ids[:, :-1]).logits[0].log_softmax(-1)
    places = document.loss_mask.nonzero()[0]
    return sum(log_probs[place - 1, ids[0, place]].item() for place in places)


def test_a_shared_prefix_is_computed_once(models, tokenizer, write, monkeypatch):
    """The few-shot examples are a part of it."""
    computed = []
    layers = models[0].model
    monkeypatch.setattr(
        layers,
        "forward",
        lambda x, *rest: (computed.append(len(x)), type(layers).forward(layers, x, *rest))[1],
    )
    rows = [row for row in generated(9) if "query" in row]
    _, _, built = evaluate(models[0], write(rows), tokenizer, num_fewshot=3)
    scored = sum(int(document.loss_mask.sum()) for document in built.documents)
    prefixes = sum(int((~built.documents[indices[0]].loss_mask).sum()) for indices in built.choices)
    assert sum(computed) <= prefixes + scored < sum(built.lengths) / 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "x"}, "row 1: keys question; a multiple-choice row has"),
        ({"query": "x", "choices": ["a"], "gold": 1}, "gold 1 must be an index, 0 to 0"),
        ({"query": "x", "choices": ["a"], "gold": "A"}, "gold 'A' must be an index, 0 to 0"),
        ({"query": "x", "choices": ["a", ""], "gold": 0}, "empty choice"),
        ({"query": "x", "choices": ["bird " * 99], "gold": 0}, "between 1 and the model's 20"),
    ],
)
def test_bad_rows_are_named(tokenizer, write, row, message):
    good = {"query": "x", "choices": ["a"], "gold": 0}
    settings = MultipleChoiceSetConfig(name="task", role="learning", path=write([good, row]))
    with pytest.raises(ValueError, match=message):
        build_sets([settings], tokenizer, 20)


def test_changes_have_their_signs():
    """Lost accuracy is positive forgetting, gained accuracy positive learning.

    The mean takes each set's own metric.
    """
    sets = [
        MultipleChoiceSetConfig(name=name, role=role, path=__file__, metric=metric)
        for name, role, metric in (
            ("arc", "forgetting", "acc_norm"),
            ("wino", "forgetting", "acc"),
            ("math", "learning", "acc"),
        )
    ]
    names = ("arc/acc", "arc/acc_norm", "wino/acc", "wino/acc_norm", "math/acc", "math/acc_norm")
    start = dict(zip(names, (0.5, 0.75, 0.5, 0.5, 0.25, 0.25), strict=True))
    now = dict(zip(names, (0.25, 0.25, 0.625, 0.5, 0.75, 0.25), strict=True))
    result = changes(sets, start, now)
    assert result["learning"] == {"math_acc": 0.5, "math_acc_norm": 0}
    assert result["forgetting"] == {
        **{"arc_acc": 0.25, "arc_acc_norm": 0.5, "wino_acc": -0.125, "wino_acc_norm": 0},
        "mean_accuracy": 0.1875,
    }


def test_the_right_choices_log_probability_is_measured_on_demand(models, tokenizer, write):
    ours, theirs = models
    rows = generated(9)
    metrics, items, built = evaluate(ours, write(rows), tokenizer, logprob=True)
    right = [expected(theirs, tokenizer, row)[0][row["gold"]] for row in rows]
    assert [item["logprob"] for item in items] == pytest.approx(right, rel=2e-5, abs=2e-5)
    assert metrics["task/logprob"] == pytest.approx(sum(right) / 9, rel=2e-5)
    lower = {**metrics, "task/logprob": metrics["task/logprob"] - 2}
    assert changes([built.config], metrics, lower)["forgetting"]["task_logprob"] == 2
    metrics, items, _ = evaluate(ours, write(rows), tokenizer)
    assert "task/logprob" not in metrics and "logprob" not in items[0]
