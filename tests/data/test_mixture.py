"""Weighted sources in one epoch: shares are met, deterministic, and checked on resumption."""

import json
import logging
from collections import Counter

import datasets
import numpy as np
import pytest

from foundry_ext.data.documents import FEATURES, Documents
from foundry_ext.data.mixture import MixedDocuments, draw
from foundry_ext.data.sources import find_revision
from tests.data.kit import assert_batches_equal, build, split_documents, walk


def documents_of(lengths, first_id: int = 1) -> Documents:
    """Return documents of these lengths (0: dropped), each with a token id of its own."""
    ids = [[first_id + i] * length for i, length in enumerate(lengths)]
    columns = {
        "input_ids": ids,
        "has_loss": [[1] * length for length in lengths],
        "outcome": [0 if length else 4 for length in lengths],
        "num_cut": [0 if length else 7 for length in lengths],
    }
    return Documents(datasets.Dataset.from_dict(columns, features=FEATURES))


def tokens(part) -> int:
    return part.describe()["tokens"]


def test_the_worked_example():
    """For 9,000 tokens and a share of 0.1, 400 tokens are used twice, then 200 of them."""
    main, other = documents_of([90] * 100), documents_of([20] * 20, first_id=1000)
    whole, part = draw([main, other], [None, 0.1])
    assert tokens(whole) == 9000 and tokens(part) == 1000
    times = Counter(part.chosen.tolist())
    assert set(times) == set(range(20))
    assert Counter(times.values()) == {2: 10, 3: 10}


@pytest.mark.parametrize("shares", [[0.05, None], [None, 0.3, 0.2], [0.9, None], [None, 1e-4]])
def test_shares_are_reached_to_within_a_document(shares):
    rng = np.random.default_rng(0)
    sources = [documents_of(rng.integers(0, 60, 500)) for _ in shares]
    parts = draw(sources, shares)
    main = parts[shares.index(None)]
    assert main.chosen.tolist() == list(range(500))
    total = tokens(main) / (1 - sum(share or 0 for share in shares))
    for part, share in zip(parts, shares, strict=True):
        if share is not None:
            over = tokens(part) - share * total
            assert 0 <= over < 60
            assert np.all(part.documents.lengths[part.chosen] > 0)
            times = np.bincount(part.chosen, minlength=500)[part.documents.lengths > 0]
            assert times.max() - times.min() <= 1, "no document twice before each was there once"


def test_a_single_source_is_used_whole():
    main = documents_of([3, 0, 5])
    (part,) = draw([main], [None])
    counts = {"kept": 2, "dropped_no_loss": 1, "tokens_cut": 7}
    described = part.describe()
    assert described["counts"] == main.counts
    assert {k: v for k, v in described["counts"].items() if v} == counts
    assert (described["documents"], described["tokens"]) == (2, 8)


def test_mixed_documents_are_those_of_the_parts():
    parts = draw([documents_of([4, 0, 6]), documents_of([2, 3], first_id=50)], [None, 0.5])
    mixed = MixedDocuments(parts)
    assert len(mixed) == len(mixed.lengths) == sum(len(part.chosen) for part in parts)
    assert mixed.source.tolist()[:4] == [0, 0, 0, 1]
    for index in range(len(mixed)):
        ids = mixed[index].input_ids
        assert len(ids) == len(mixed[index].loss_mask) == mixed.lengths[index]
        assert all((ids >= 50) == (mixed.source[index] == 1))
    assert mixed.counts["kept"] == np.count_nonzero(mixed.lengths)
    assert mixed.counts["tokens_cut"] == 7


def test_the_fingerprint_is_of_the_mixture():
    def fingerprint(share=0.2, first_id=50):
        sources = [documents_of([9] * 30), documents_of([3] * 40, first_id)]
        return MixedDocuments(draw(sources, [None, share])).fingerprint

    assert fingerprint() == fingerprint()
    assert len({fingerprint(), fingerprint(share=0.3), fingerprint(first_id=51)}) == 3


def test_nothing_to_draw_from():
    with pytest.raises(ValueError, match=r"dataset.datasets\[1\]: no document is left to draw"):
        draw([documents_of([9]), documents_of([0, 0])], [None, 0.5])


# --- through the builders ------------------------------------------------------------------------


@pytest.fixture
def mixed(make_rows, write_jsonl, tmp_path, monkeypatch) -> dict:
    """Return the `dataset` section: prompts and responses, and a fifth of plain text."""
    monkeypatch.chdir(tmp_path)
    rows = write_jsonl(make_rows(120), "rows.jsonl")
    texts = write_jsonl([{"body": f"~{i}~" * (3 + i % 5)} for i in range(90)], "texts.jsonl")
    return {
        "datasets": [
            {"hf_name": str(rows), "split": "train"},
            {"hf_name": str(texts), "split": "train", "text_key": "body", "share": 0.2},
        ],
        "max_seq_len": 128,
        "pack_tokens": 256,
        "shuffle": True,
    }


def test_without_shuffling_the_sources_follow_one_another(tokenizer, mixed):
    dataset = build(tokenizer, {**mixed, "shuffle": False}).dataloader.dataset
    order = np.concatenate(list(dataset.sampler.plan(0)))
    assert order.tolist() == list(range(len(dataset.documents)))
    assert np.all(np.diff(dataset.documents.source[dataset.sampler.used[order]]) >= 0)


def test_replay_in_a_finetuning_run(tokenizer, mixed, caplog):
    with caplog.at_level(logging.INFO, "foundry_ext"):
        spec = build(tokenizer, mixed)
    dataset = spec.dataloader.dataset
    main, replay = dataset.description
    assert list(main) == ["name", "split", "revision", "documents", "tokens", "counts"]
    assert main["documents"] == 120 and main["counts"]["kept"] == 120
    assert main["name"].endswith("rows.jsonl") and replay["name"].endswith("texts.jsonl")
    total = main["tokens"] + replay["tokens"]
    assert 0 <= replay["tokens"] / total - 0.2 < 128 / total
    assert "20." in caplog.text and "of an epoch's tokens" in caplog.text

    documents = [
        (ids, labels)
        for batch in walk(spec)
        for pack in batch
        for ids, labels in zip(split_documents(pack), split_documents(pack, "labels"), strict=True)
    ]
    texts = [(ids, labels) for ids, labels in documents if "~" in tokenizer.decode(ids)]
    assert len(documents) - len(texts) == 120
    assert sum(len(ids) for ids, _ in texts) == replay["tokens"]
    assert all(labels[1:] == ids[1:] for ids, labels in texts), "all of a plain text is learned"
    assert any(labels[1] == -100 for ids, labels in documents if (ids, labels) not in texts)


def test_a_single_source_has_a_description_too(tokenizer, mixed):
    (entry,) = [entry for entry in mixed["datasets"] if "share" not in entry]
    alone = {**{key: value for key, value in mixed.items() if key != "datasets"}, **entry}
    ours = build(tokenizer, {**mixed, "datasets": [entry]})
    theirs = build(tokenizer, alone)
    (description,) = theirs.dataloader.dataset.description
    assert [description] == ours.dataloader.dataset.description
    assert description["documents"] == 120
    assert_batches_equal(walk(ours), walk(theirs))
    assert ours.dataloader.dataset.fingerprint == theirs.dataloader.dataset.fingerprint


def test_texts_of_several_columns(tokenizer, mixed, write_jsonl):
    texts = write_jsonl([{"text": f"a bird {i}"} for i in range(50)], "more.jsonl")
    mixed["datasets"][0] = {"hf_name": str(texts), "split": "train"}
    dataset = build(tokenizer, mixed, name="packed_text").dataloader.dataset
    assert [source["documents"] > 0 for source in dataset.description] == [True, True]


def test_the_same_again_whatever_the_seed(tokenizer, mixed):
    """Seeds change the order but not the documents, so runs of all seeds have the same data."""
    one, again, other = (
        build(tokenizer, {**mixed, "shuffle_seed": seed}).dataloader.dataset for seed in (1, 1, 2)
    )
    assert one.fingerprint == again.fingerprint != other.fingerprint
    assert one.documents.fingerprint == other.documents.fingerprint
    assert_batches_equal(walk(build(tokenizer, mixed)), walk(build(tokenizer, mixed)))


def test_a_run_is_resumed_in_the_middle_of_a_mixture(tokenizer, mixed):
    spec = build(tokenizer, mixed)
    whole = walk(spec, epoch=1)
    spec.dataloader.batch_sampler.set_epoch(1)
    iterator = iter(spec.dataloader)
    for _ in range(3):
        next(iterator)
    state = spec.dataloader.dataset.state_dict()
    resumed = build(tokenizer, mixed)
    resumed.dataloader.dataset.load_state_dict(state)
    assert_batches_equal(walk(resumed, epoch=1), whole[3:])
    mixed["datasets"][1]["share"] = 0.3
    with pytest.raises(ValueError, match="the checkpoint was made with other data"):
        build(tokenizer, mixed).dataloader.dataset.load_state_dict(state)


ERRORS = {
    "all shared": ({0: {"share": 0.5}}, r"dataset.datasets: 0 of 2 sources .* share"),
    "none shared": ({1: {"share": None}}, r"dataset.datasets: 2 of 2 sources .* share"),
    "too much": ({1: {"share": 1.0}}, r"datasets\[1\].share: 1.0 .* between 0 and 1"),
    "no number": ({1: {"share": "5%"}}, r"datasets\[1\].share: '5%' .* between 0 and 1"),
    "unknown": (
        {1: {"textkey": "body"}},
        r"unknown key dataset.datasets\[1\].textkey, did you mean 'text_key'\? the keys .*text_key",
    ),
    "no name": ({0: {"hf_name": None}}, r"set dataset.datasets\[0\].hf_name"),
    "prompts of text": (
        {1: {"target_prompts": "all"}},
        r"datasets\[1\].target_prompts does not go with dataset.datasets\[1\].text_key",
    ),
    "wrong overlong": ({1: {"overlong": "cut"}}, "overlong: 'cut'; choose one of"),
    "no column": ({1: {"text_key": "text"}}, "no column 'text' in .*texts.jsonl; there are body"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_entry_and_the_way_out(tokenizer, mixed, case: str):
    changes, message = ERRORS[case]
    for position, change in changes.items():
        mixed["datasets"][position] |= change
    with pytest.raises(ValueError, match=message):
        build(tokenizer, mixed)


def test_shares_of_one_leave_nothing(tokenizer, mixed):
    mixed["datasets"][1]["share"] = 0.6
    mixed["datasets"].append(mixed["datasets"][1] | {"share": 0.4})
    with pytest.raises(ValueError, match="shares add up to 1, which leaves nothing for the main"):
        build(tokenizer, mixed)


@pytest.mark.parametrize(
    ("key", "value"), [("hf_name", "a/b"), ("overlong", "drop"), ("preprocessing_fn", "a:b")]
)
def test_a_source_beside_the_list_is_an_error(tokenizer, mixed, key, value):
    with pytest.raises(ValueError, match=f"dataset.{key} does not go with dataset.datasets"):
        build(tokenizer, {**mixed, key: value})


@pytest.mark.parametrize("datasets", [[], {}, "a/b", ["a/b"]])
def test_no_list_of_sources(tokenizer, mixed, datasets):
    with pytest.raises(
        ValueError, match=r"dataset.datasets(\[0\]: 'a/b' is no mapping|: give a l)"
    ):
        build(tokenizer, {**mixed, "datasets": datasets})


def test_errors_come_before_long_work(tokenizer, mixed, monkeypatch):
    monkeypatch.setattr("foundry_ext.data.loading.load_rows", pytest.fail)
    mixed["datasets"][1]["share"] = 2
    with pytest.raises(ValueError, match=r"dataset.datasets\[1\].share: 2 .* between 0 and 1"):
        build(tokenizer, mixed)


def test_the_hubs_commit_is_found(make_rows, write_jsonl, tmp_path):
    rows = datasets.Dataset.from_list(make_rows(3))
    assert find_revision(rows) is None
    assert find_revision(rows, {"revision": "main"}) == "main"
    commit = "0123456789" * 4
    for source in (
        f"hf://datasets/a/b@{commit}/data/train.parquet",
        f"/cache/hub/datasets--a--b/snapshots/{commit}/train.parquet",
    ):
        rows.info.download_checksums = {source: {"num_bytes": 1}}
        held_out = rows.filter(lambda row: True)
        assert find_revision(held_out, {"revision": "main"}) == commit
    path = write_jsonl(make_rows(3))
    assert json.loads(path.read_text().splitlines()[0])
    loaded = datasets.load_dataset("json", data_files={"train": str(path)}, split="train")
    assert find_revision(loaded) is None
