"""Property of the readers: any texts, in any format, are the same rows and the same tokens."""

import csv
import json

import datasets
import datasets.config
import pytest

pytest.importorskip("hypothesis", reason="run `make install`")

from hypothesis import given
from hypothesis import strategies as st
from streaming import MDSWriter

from foundry_ext.data.sources import load_rows
from foundry_ext.data.streams import load_streams, tokenize_stream
from foundry_ext.data.tokenize import TokenizeSettings, tokenize_rows
from tests.properties import examples

# What a reader might take for something else than text, and any character of UTF-8.
PIECES = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
    st.sampled_from(
        [
            *("007", "42", "4.0", "1e3", "-0", "null", "NA", "NaN", "None", "nan", "#N/A", "true"),
            *("2021-05-03", "2021-05-03T10:00:00Z", "12:30", "{}", "[1]", '"', '""', "'", ",", ";"),
            *("\t", "\n", "\r", "\r\n", "\0", "\ufeff", "\\ud800", "\\", "\u2028", "\x85", "\x1a"),
        ]
    ),
)
CELLS = st.lists(PIECES, max_size=4).map("".join)
ROWS = st.lists(
    st.fixed_dictionaries({"prompt": CELLS, "response": CELLS}), min_size=1, max_size=30
)
SETTINGS = TokenizeSettings(max_seq_len=64)


def write_csv(path, rows, **dialect):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), **dialect)
        writer.writeheader()
        writer.writerows(rows)


def write_lines(path, rows, **form):
    text = "".join(json.dumps(row, **form) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8", newline="")


WRITERS = {
    "rows.csv": write_csv,
    "quoted.csv": lambda path, rows: write_csv(path, rows, quoting=csv.QUOTE_ALL),
    "rows.tsv": lambda path, rows: write_csv(path, rows, delimiter="\t", quoting=csv.QUOTE_ALL),
    "rows.jsonl": lambda path, rows: write_lines(path, rows),
    "plain.jsonl": lambda path, rows: write_lines(path, rows, ensure_ascii=False),
    "rows.json": lambda path, rows: path.write_text(json.dumps(rows, indent=1)),
    "rows.parquet": lambda path, rows: datasets.Dataset.from_list(rows).to_parquet(path),
}


def write_mds(folder, rows):
    columns = {"prompt": "str", "response": "str"}
    with MDSWriter(out=str(folder), columns=columns) as out:
        for row in rows:
            out.write(row)


@examples(15)
@given(ROWS)
def test_a_text_is_the_same_in_every_format(tmp_path_factory, tokenizer, rows):
    folder = tmp_path_factory.mktemp("formats")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        for name, write in WRITERS.items():
            write(folder / name, rows)
            read = load_rows(str(folder / name), "train")
            assert list(read) == rows, name
        write_mds(folder / "mds", rows)
        stream = load_streams({"local": str(folder / "mds")}, tokenizer)
        streamed = tokenize_stream(stream, tokenizer, SETTINGS)
        tokens = tokenize_rows(read, tokenizer, SETTINGS)
        assert streamed.fingerprint == tokens.fingerprint


@examples(30)
@given(st.lists(CELLS, min_size=1, max_size=20))
def test_a_single_column_of_any_texts_is_read(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("column")
    rows = [{"text": text} for text in texts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        write_csv(folder / "rows.csv", rows)
        assert list(load_rows(str(folder / "rows.csv"), "train")) == rows
