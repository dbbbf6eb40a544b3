"""Documents of an evaluation that are trained on, found by their tokens."""

import itertools
import json

import numpy as np
import pytest

from foundry_ext.data.overlap import find_overlap
from tests.data import kit


@pytest.fixture
def dataset(tokenizer, tmp_path):
    """Return dataset(texts, max_seq_len=20, **keys): the packed dataset of these texts."""
    numbers = itertools.count()

    def build(texts, max_seq_len=20, **keys):
        path = tmp_path / f"{next(numbers)}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        settings = {"hf_name": str(path), "split": "train", "max_seq_len": max_seq_len, **keys}
        return kit.build(tokenizer, settings, name="packed_text").dataloader.dataset

    return build


def texts(count: int, seed: int = 0, words: int = 3) -> list[str]:
    """Return texts of at most `words` of three words: many are equal, and all of them alike."""
    rng = np.random.default_rng(seed)
    return [
        " ".join(rng.choice(["a", "b", "ab"], rng.integers(1, words + 1))) for _ in range(count)
    ]


def ids(dataset, most: int) -> list[bytes]:
    documents = dataset.documents
    used = np.flatnonzero(documents.lengths)
    return [documents[index].input_ids[:most].tobytes() for index in used]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("train_len", "eval_len"), [(20, 20), (4, 20), (20, 4)])
def test_it_is_what_a_comparison_of_all_pairs_finds(dataset, seed, train_len, eval_len):
    trained = dataset(texts(40, seed), train_len, overlong="truncate")
    evaluated = dataset([*texts(30, seed + 100, words=6), ""], eval_len, overlong="truncate")
    most = min(train_len, eval_len)
    theirs = set(ids(trained, most))
    expected = [index for index, one in enumerate(ids(evaluated, most)) if one in theirs]
    found = find_overlap(evaluated, trained)
    assert (found.documents, found.of_documents) == (len(expected), 30)
    lengths = evaluated.documents.lengths
    assert 0 < len(expected) < 30
    assert found.share == pytest.approx(lengths[expected].sum() / lengths.sum())
    assert found.example.startswith(f"document {expected[0]} of ")


def test_the_example_is_right_and_only_documents_in_use_count(dataset):
    trained = dataset(["x y", "", "same text", "same text"])
    evaluated = dataset(["other", "same text", "x y"])
    found = find_overlap(evaluated, trained)
    places = [one.description[0]["name"] for one in (evaluated, trained)]
    assert found.example == f"document 1 of {places[0]} is document 2 of {places[1]}"
    assert find_overlap(evaluated, trained, np.array([0])).documents == 0
    assert find_overlap(evaluated, trained, np.array([0, 2])).documents == 1


def test_of_a_mixture_only_the_documents_that_are_drawn_count(dataset, tokenizer, tmp_path):
    main, replay = (dataset(texts) for texts in (["main one", "main two"], texts(60, words=9)))
    sources = [
        {"hf_name": main.description[0]["name"], "split": "train"},
        {"hf_name": replay.description[0]["name"], "split": "train", "share": 0.5},
    ]
    settings = {"datasets": sources, "max_seq_len": 20}
    mixed = kit.build(tokenizer, settings, name="packed_text").dataloader.dataset
    drawn = set(ids(mixed, 20))
    expected = [one in drawn for one in ids(replay, 20)]
    assert 0 < sum(expected) < 60
    assert find_overlap(replay, mixed).documents == sum(expected)
    assert find_overlap(main, mixed).share == 1
    assert find_overlap(mixed, main).documents == 2
