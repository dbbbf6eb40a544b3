"""Sources of rows: files, folders, builders, slices, held-out parts, MDS streams."""

import csv
import json
import random

import datasets
import datasets.config
import numpy as np
import pytest
from streaming import MDSWriter

from foundry_ext.data.sources import fetch, hold_out, load_rows
from foundry_ext.data.streams import load_streams, tokenize_stream
from foundry_ext.data.table import Tokens, to_records
from foundry_ext.data.tokenize import TokenizeSettings, tokenize_rows
from tests.data.kit import build


def write(path, rows):
    """Write `rows` in the format of the path's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_file(tmp_path, make_rows, suffix: str, split: str):
    """A single file is one split, whatever its name."""
    rows = make_rows(10)
    assert load_rows(str(write(tmp_path / f"rows{suffix}", rows)), split).to_list() == rows


def test_a_folder(tmp_path, make_rows):
    rows = {"train": make_rows(10), "test": make_rows(4, seed=1)}
    for split, part in rows.items():
        write(tmp_path / "folder" / f"{split}.jsonl", part)
    for split, part in rows.items():
        assert load_rows(str(tmp_path / "folder"), split).to_list() == part
        safe = load_rows(str(tmp_path / "folder"), split, safe_load=True)
        assert safe.to_list() == part


def test_a_builder_with_files(tmp_path, make_rows):
    rows = make_rows(10)
    files = {"train": str(write(tmp_path / "a.jsonl", rows))}
    assert load_rows("json", "train", hf_kwargs={"data_files": files}).to_list() == rows


@pytest.mark.parametrize(
    ("split", "wanted"),
    [
        ("train[:50%]", slice(0, 5)),
        ("train[50%:]", slice(5, 10)),
        ("train[2:4]", slice(2, 4)),
        ("train[-1:]", slice(9, 10)),
    ],
)
def test_slices(tmp_path, make_rows, split: str, wanted: slice):
    rows = make_rows(10)
    write(tmp_path / "train.jsonl", rows)
    for name in (tmp_path / "train.jsonl", tmp_path):
        assert load_rows(str(name), split).to_list() == rows[wanted]


@pytest.mark.parametrize("name", ["missing.jsonl", "missing.parquet", "missing_folder"])
def test_what_is_missing_is_named(tmp_path, name: str):
    with pytest.raises(FileNotFoundError, match=name):
        load_rows(str(tmp_path / name), "train")


def test_a_relative_missing_file_says_from_where(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = rf"dataset file data/missing.jsonl does not exist \(in {tmp_path}\)"
    with pytest.raises(FileNotFoundError, match=message):
        load_rows("data/missing.jsonl", "train")


def test_a_split_is_needed():
    with pytest.raises(ValueError, match=r"dataset rows.jsonl: set split, e\.g\. split: train"):
        fetch("rows.jsonl", None)


def test_local_names_are_not_fetched():
    for name in ("rows.jsonl", "/a/folder", "meta-math/MetaMathQA", "json"):
        assert fetch(name, "train[:1%]") == (name, "train[:1%]")


def test_an_endless_dataset_is_refused(tmp_path, make_rows):
    path = write(tmp_path / "rows.jsonl", make_rows(3))
    with pytest.raises(ValueError, match="streaming is not possible"):
        load_rows(str(path), "train", hf_kwargs={"streaming": True})


def metamathqa_rows(num_questions: int = 200, seed: int = 0) -> list[dict[str, str]]:
    """Return rephrasings of shared questions, in the columns of meta-math/MetaMathQA."""
    rng = random.Random(seed)
    kinds = ("GSM_Rephrased", "GSM_SV", "GSM_FOBAR", "GSM_AnsAug")
    rows = []
    for question in range(num_questions):
        original = f"Question {seed}.{question}: how many?"
        for _ in range(rng.randint(1, 6)):
            kind = rng.choice(kinds)
            query = f"{kind} of {original} {rng.random()}"
            answer = f"The answer is: {rng.random()}"
            row = {"type": kind, "query": query, "original_question": original, "response": answer}
            rows.append(row)
    rng.shuffle(rows)
    return rows


def parts(rows, fraction: float = 0.2):
    dataset = datasets.Dataset.from_list(rows)
    return tuple(
        hold_out(dataset, by="original_question", fraction=fraction, part=part).to_list()
        for part in ("train", "eval")
    )


def questions(rows) -> set[str]:
    return {row["original_question"] for row in rows}


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.7])
def test_no_question_is_on_both_sides(fraction: float):
    """Trap 37: rows rephrase shared questions, so a split by rows would leak."""
    rows = metamathqa_rows()
    train, evaluation = parts(rows, fraction)
    assert train
    assert evaluation
    assert not questions(train) & questions(evaluation)
    assert questions(train) | questions(evaluation) == questions(rows)
    # All rows, in their order.
    order = {row["query"]: i for i, row in enumerate(rows)}
    assert sorted(train + evaluation, key=lambda row: order[row["query"]]) == rows
    assert abs(len(questions(evaluation)) / 200 - fraction) < 0.1


def test_a_row_keeps_its_side_when_rows_are_added():
    rows, more = metamathqa_rows(), metamathqa_rows(seed=1)
    train, evaluation = parts(rows)
    larger_train, larger_evaluation = parts([*more, *rows])
    assert questions(train) <= questions(larger_train)
    assert questions(evaluation) <= questions(larger_evaluation)


def test_a_larger_fraction_holds_out_no_other_questions():
    rows = metamathqa_rows()
    assert questions(parts(rows, 0.1)[1]) < questions(parts(rows, 0.3)[1])


def test_hold_out_when_loading(tmp_path):
    rows = metamathqa_rows(50)
    path = write(tmp_path / "rows.jsonl", rows)
    for part, expected in zip(("train", "eval"), parts(rows), strict=True):
        holdout = {"by": "original_question", "fraction": 0.2, "part": part}
        assert load_rows(str(path), "train", holdout=holdout).to_list() == expected


def test_hold_out_leaves_no_file_that_could_be_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = write(tmp_path / "rows.jsonl", [{"a": str(i)} for i in range(20)])
    load_rows(str(path), "train", holdout={"by": "a", "fraction": 0.5, "part": "train"})
    assert [one.name for one in (tmp_path / "cache").rglob("*.arrow")] == ["rows.arrow"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"by": "question"}, "no column 'question'; there are type, query, original_question"),
        ({"part": "test"}, "part 'test', .*part is train or eval"),
        ({"fraction": 0}, r"fraction 0; .*fraction in \(0, 1\)"),
        ({"fraction": 1.0}, r"fraction 1.0; .*fraction in \(0, 1\)"),
        ({"seed": 1}, "give by, fraction and part, not by, fraction, part, seed"),
        (None, "give by, fraction and part, not by"),
    ],
)
def test_a_wrong_holdout_is_an_error(tmp_path, change, message: str):
    path = write(tmp_path / "rows.jsonl", metamathqa_rows(5))
    holdout = {"by": "original_question", "fraction": 0.2, "part": "train"}
    holdout = {"by": "type"} if change is None else {**holdout, **change}
    with pytest.raises(ValueError, match=message):
        load_rows(str(path), "train", holdout=holdout)


def write_mds(folder, rows, columns=("prompt", "response")) -> str:
    with MDSWriter(out=str(folder), columns=dict.fromkeys(columns, "str"), size_limit=600) as out:
        for row in rows:
            out.write(row)
    return str(folder)


SETTINGS = TokenizeSettings(max_seq_len=64)


def tokenize_all(dataset, tokenizer):
    return tokenize_stream(load_streams(dataset, tokenizer), tokenizer, SETTINGS)


def test_a_stream_is_read_as_rows_are(tmp_path, tokenizer, make_rows):
    """Rows are read over several shards, in stored order, each once."""
    rows = make_rows(40)
    remote = write_mds(tmp_path / "remote" / "train", rows)
    dataset = {"remote": str(tmp_path / "remote"), "local": str(tmp_path / "a"), "split": "train"}
    stream = load_streams(dataset, tokenizer)
    assert len(stream.shards) > 1, remote
    documents = tokenize_stream(stream, tokenizer, SETTINGS)
    expected = tokenize_rows(datasets.Dataset.from_list(rows), tokenizer, SETTINGS)
    np.testing.assert_array_equal(documents.lengths, expected.lengths)
    assert documents.fingerprint == expected.fingerprint
    assert documents.counts == expected.counts
    again = tokenize_all({**dataset, "local": str(tmp_path / "b")}, tokenizer)
    assert again.fingerprint == documents.fingerprint


def test_two_streams_are_read_one_after_the_other(tmp_path, tokenizer, make_rows):
    rows = make_rows(25), make_rows(15, seed=1)
    streams = {
        name: {"remote": write_mds(tmp_path / name, part), "local": str(tmp_path / f"local_{name}")}
        for name, part in zip("ab", rows, strict=True)
    }
    documents = tokenize_all({"streams": streams}, tokenizer)
    both = datasets.Dataset.from_list([*rows[0], *rows[1]])
    assert documents.fingerprint == tokenize_rows(both, tokenizer, SETTINGS).fingerprint


def test_a_tokenised_stream(tmp_path, tokenizer):
    """Streams may hold rows that llm-foundry's converter has tokenised already."""
    ids, labels = np.array([5, 6, 7]), np.array([8, 9, 0])
    with MDSWriter(
        out=str(tmp_path / "mds"), columns={"input_ids": "ndarray", "labels": "ndarray"}
    ) as out:
        out.write({"input_ids": ids, "labels": labels})
    documents = tokenize_all({"local": str(tmp_path / "mds")}, tokenizer)
    assert documents[0].input_ids.tolist() == [5, 6, 7, 8, 9, 0]
    assert documents[0].loss_mask.tolist() == [False] * 3 + [True] * 3


STORED = [(10, 54), (70, 30), (3, 400), (20, 2)]  # tokens of prompt and response


@pytest.mark.parametrize("form", ["ndarray", "bytes", "turns"])
@pytest.mark.parametrize("overlong", ["truncate", "split", "drop"])
def test_a_tokenised_stream_is_cut_and_counted_as_text_is(tmp_path, tokenizer, form, overlong):
    """llm-foundry cuts prompt and response to max_seq_len, each, before anything can count it."""
    rows = [(np.full(a, 5, np.int64), np.full(b, 6, np.int64)) for a, b in STORED]
    columns = {"turns": "json"} if form == "turns" else {"input_ids": form, "labels": form}
    with MDSWriter(out=str(tmp_path / "mds"), columns=columns) as out:
        for ids, labels in rows:
            turn = {"input_ids": ids, "labels": labels}
            if form == "turns":
                out.write({"turns": [{key: value.tolist() for key, value in turn.items()}]})
            else:
                out.write(turn if form == "ndarray" else {k: v.tobytes() for k, v in turn.items()})
    settings = TokenizeSettings(max_seq_len=64, overlong=overlong)
    dataset = {"local": str(tmp_path / "mds")}
    documents = tokenize_stream(load_streams(dataset, tokenizer), tokenizer, settings)
    records = [
        record
        for index, (ids, labels) in enumerate(rows)
        for record in to_records(
            index,
            Tokens(
                np.array([*ids, *labels, tokenizer.eos_token_id], np.int32),
                np.arange(len(ids) + len(labels) + 1) >= len(ids),
            ),
            64,
            overlong,
        )
    ]
    given = sum(a + b + 1 for a, b in STORED)
    assert documents.lengths.sum() + documents.counts["tokens_cut"] == given
    assert documents.counts["tokens_cut"] == sum(r.num_truncated_tokens for r in records)
    assert len(documents) == len(records)
    for document, record in zip(documents.read(np.arange(len(records))), records, strict=True):
        assert document.input_ids.tolist() == record.tokens.input_ids.tolist()
        assert document.loss_mask.tolist() == record.tokens.loss_mask.tolist()


def test_a_tokenised_stream_under_overlong_error(tmp_path, tokenizer):
    with MDSWriter(out=str(tmp_path / "mds"), columns={"turns": "json"}) as out:
        out.write({"turns": [{"input_ids": [5, 6], "labels": [7] * 98}]})
    stream = load_streams({"local": str(tmp_path / "mds")}, tokenizer)
    with pytest.raises(ValueError, match="row 0 has 101 tokens, more than max_seq_len 64"):
        tokenize_stream(stream, tokenizer, TokenizeSettings(max_seq_len=64, overlong="error"))


def test_a_bad_row_of_a_stream_is_named(tmp_path, tokenizer):
    rows = [{"question": "a", "answer": "b"}]
    write_mds(tmp_path / "mds", rows, columns=("question", "answer"))
    with pytest.raises(ValueError, match="row 0: UnknownExampleTypeError"):
        tokenize_all({"local": str(tmp_path / "mds")}, tokenizer)


@pytest.mark.parametrize("weight", ["proportion", "repeat", "choose"])
def test_weighted_streams_are_refused(tmp_path, tokenizer, weight: str):
    streams = {"a": {"local": str(tmp_path), weight: 2}}
    message = rf"streams.a.{weight}: weighted streams are not supported; .* once per epoch"
    with pytest.raises(ValueError, match=message):
        load_streams({"streams": streams}, tokenizer)


def test_local_shards_need_no_remote(tmp_path, tokenizer, make_rows):
    rows = make_rows(5)
    dataset = {"local": write_mds(tmp_path / "mds", rows), "max_seq_len": 64}
    documents = build(tokenizer, dataset).dataloader.dataset.documents
    expected = tokenize_rows(datasets.Dataset.from_list(rows), tokenizer, SETTINGS)
    assert documents.fingerprint == expected.fingerprint


def test_local_without_shards_says_what_to_set(tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match=rf"local: {tmp_path} holds no .* set remote to"):
        build(tokenizer, {"local": str(tmp_path), "max_seq_len": 64})
    message = r"dataset.hf_name does not go with dataset.local: leave one out"
    with pytest.raises(ValueError, match=message):
        build(tokenizer, {"local": str(tmp_path), "hf_name": "a.jsonl", "max_seq_len": 64})
