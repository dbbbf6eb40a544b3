"""Rows of local files are as the file writes them; one rule says which files are read."""

import bz2
import csv
import gzip
import json
import logging
import os
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from streaming import MDSWriter

from foundry_ext.data import local_rows
from foundry_ext.data.sources import load_rows
from foundry_ext.utils.errors import UserError


@pytest.fixture(autouse=True)
def _a_cache_of_its_own(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def lines(*rows: Any) -> bytes:
    """Return JSON lines; bytes are a line as it is."""
    return b"".join(
        (row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows
    )


def write(path: Path, content: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


def read(path: Any, split: str = "train", **hf_kwargs: Any) -> list[dict[str, Any]]:
    return list(load_rows(str(path), split, hf_kwargs=hf_kwargs))  # pyright: ignore


# --- content decides ------------------------------------------------------------------------------


def _folder(suffix: str) -> Any:
    return lambda folder: folder / f"train{suffix}", lambda folder: folder


def _file(suffix: str) -> Any:
    return lambda folder: folder / f"rows{suffix}", lambda folder: folder / f"rows{suffix}"


def write_answer(path: Path, answer: str) -> None:
    row = {"prompt": "a", "response": answer}
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([row]), path, compression="none")
    elif path.suffix == ".csv":
        path.write_text(f"prompt,response\na,{answer}\n")
    elif path.suffix == ".txt":
        path.write_text(f"{answer}\n")
    else:
        path.write_text(json.dumps(row) + "\n")


@pytest.mark.parametrize("make", [_file, _folder])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".txt"])
def test_a_changed_word_is_read_whatever_the_time_says(tmp_path, make, suffix: str):
    """The cache of `datasets` is keyed by path and mtime, and would return the old row."""
    place, name = (one(tmp_path) for one in make(suffix))
    name = tmp_path if suffix == ".txt" else name  # single ones have no suffix of rows
    for answer in ("left", "down"):
        write_answer(place, answer)
        os.utime(place, (10**9, 10**9))
        (row,) = read(name)
        assert answer in row.values()


def test_a_folder_with_configurations_is_read_by_content_too(tmp_path):
    """Such a folder, a clone from the hub, is read by `datasets`."""
    write(tmp_path / "README.md", b"---\nconfigs:\n- config_name: b\n  data_files: b.jsonl\n---\n")
    write(tmp_path / "a.jsonl", lines({"a": "1"}))
    for answer in ("left", "down"):
        write_answer(tmp_path / "b.jsonl", answer)
        os.utime(tmp_path / "b.jsonl", (10**9, 10**9))
        assert [row["response"] for row in read(tmp_path, name="b")] == [answer]


def test_unchanged_files_are_parsed_once(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", lines({"a": "1"}))
    first = read(path)
    monkeypatch.setattr(local_rows, "read_json", pytest.fail)
    os.utime(path, (1, 1))
    assert read(path) == read(write(tmp_path / "copy" / "b.jsonl", lines({"a": "1"}))) == first


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    """Otherwise the rows of one content would be kept under the digest of the other."""
    path = write(tmp_path / "a.jsonl", lines({"a": "1"}))
    write_rows = local_rows.write_rows

    def change_and_write(*arguments):
        write(tmp_path / "a.jsonl", lines({"a": "2"}))
        write_rows(*arguments)

    monkeypatch.setattr(local_rows, "write_rows", change_and_write)
    with pytest.raises(UserError, match=r"a.jsonl changed while it was read; start again"):
        read(path)
    monkeypatch.undo()


def test_a_change_that_makes_reading_fail_is_named(tmp_path, monkeypatch):
    """Between the two readings, of types and of rows, a text becomes a number."""
    path = write(tmp_path / "a.jsonl", lines({"a": "1"}))
    read_json, readings = local_rows.read_json, []

    def change_and_read(*arguments):
        if readings:
            write(tmp_path / "a.jsonl", lines({"a": 1}))
        readings.append(1)
        return read_json(*arguments)

    monkeypatch.setattr(local_rows, "read_json", change_and_read)
    with pytest.raises(UserError, match=r"a.jsonl changed while it was read; start again"):
        read(path)


# --- the cache is checked -------------------------------------------------------------------------

CACHED = (".jsonl", ".csv", ".parquet", ".arrow", ".txt")


def write_rows_of(folder: Path, suffix: str) -> None:
    table = pa.table({"text": ["a stone", "a river"]})
    if suffix == ".arrow":
        with pa.ipc.new_stream(folder / f"train{suffix}", table.schema) as writer:
            writer.write_table(table)
    elif suffix == ".parquet":
        pq.write_table(table, folder / f"train{suffix}")
    elif suffix == ".jsonl":
        write(folder / f"train{suffix}", lines(*table.to_pylist()))
    else:
        header = "text\n" if suffix == ".csv" else ""
        write(folder / f"train{suffix}", f"{header}a stone\na river\n".encode())


@pytest.mark.parametrize("suffix", CACHED)
def test_damaged_rows_of_the_cache_are_read_from_the_file_again(tmp_path, suffix: str, caplog):
    """A word, the header, and a whole other file of the same size."""
    write_rows_of(tmp_path, suffix)
    rows = read(tmp_path)
    assert rows == [{"text": "a stone"}, {"text": "a river"}]
    (cached,) = Path(datasets.config.HF_DATASETS_CACHE).rglob("*.arrow")
    whole = cached.read_bytes()
    flipped = whole.replace(b"river", b"rives")
    assert flipped != whole
    for damaged in (flipped, bytes(200) + whole[200:], bytes(len(whole))):
        cached.unlink()
        cached.write_bytes(damaged)
        caplog.clear()
        assert read(tmp_path) == rows
        assert caplog.text.count("making it anew") == 1
        assert str(cached.parent) in caplog.text and "rows.arrow" in caplog.text
        assert cached.read_bytes() == whole


@pytest.mark.parametrize("change", ["cut", "gone", "other"])
def test_a_damaged_digest_does_not_matter(tmp_path, change: str):
    write_rows_of(tmp_path, ".jsonl")
    rows = read(tmp_path)
    (digest,) = Path(datasets.config.HF_DATASETS_CACHE).rglob("rows.digest")
    text = digest.read_text()
    changed = {"cut": text[:-1], "other": text[::-1]}
    digest.unlink() if change == "gone" else digest.write_text(changed[change])
    assert read(tmp_path) == rows
    assert digest.read_text() == text


def test_rows_of_an_earlier_version_are_read_from_the_file_again(tmp_path, caplog):
    """It wrote no digest."""
    write_rows_of(tmp_path, ".jsonl")
    rows = read(tmp_path)
    (digest,) = Path(datasets.config.HF_DATASETS_CACHE).rglob("rows.digest")
    digest.unlink()
    size = {"rows.arrow": digest.with_name("rows.arrow").stat().st_size}
    digest.with_name("whole.json").write_text(json.dumps(size))
    assert read(tmp_path) == rows
    assert "an earlier version wrote it, without a digest; making it anew" in caplog.text


def test_damaged_rows_that_cannot_be_made_anew_are_named(tmp_path, monkeypatch):
    write_rows_of(tmp_path, ".jsonl")
    read(tmp_path)
    (cached,) = Path(datasets.config.HF_DATASETS_CACHE).rglob("rows.arrow")
    cached.write_bytes(bytes(cached.stat().st_size))
    monkeypatch.setattr("foundry_ext.data.cache.discard", lambda *_: False)
    with pytest.raises(UserError, match=rf"{cached.parent}: the bytes of rows.arrow .* delete"):
        read(tmp_path)


# --- text is text ---------------------------------------------------------------------------------

ODD = ["42", "007", "null", "NA", "", "2021-05-03", "1e3", "true", " x ", 'a "b"', "a\r\nb", "None"]


def test_cells_of_a_csv_stay_as_they_are_written(tmp_path):
    rows = [{"question": "q", "answer": cell} for cell in ODD]
    with open(tmp_path / "a.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["question", "answer"])
        writer.writeheader()
        writer.writerows(rows)
    assert read(tmp_path / "a.csv") == rows


@pytest.mark.parametrize("cell", ODD)
def test_a_json_text_stays_text_in_every_row(tmp_path, cell: str):
    rows = [{"question": "q", "answer": cell}] * 3
    assert read(write(tmp_path / "a.jsonl", lines(*rows))) == rows
    assert read(write(tmp_path / "a.json", json.dumps(rows).encode())) == rows
    nested = [{"messages": [{"role": "user", "content": cell}]}]
    assert read(write(tmp_path / "b.jsonl", lines(*nested))) == nested


NUMBERS = [
    [1, 2.5],
    [2**70, 1],
    [42, None, 7],
    [1.0, 2],
    [True, False],
    [[1, 2.5], []],
    [{"a": 1}, {"a": 2.5}],
    [{"a": "x"}, {"a": 1}],
    [{}, {"a": 1}],
    [[{"a": [1]}, {"a": ["x"]}]],
    [{"height": "3m"}, {"age": "7"}],
    [{"a": "1", "b": "2"}, {"b": "2", "a": "1"}],
    [{"a": {"b": None}}, {"a": {}}],
    [[{"role": "user"}, {"role": "user", "name": "x"}]],
    [{"a": {"b": "1"}}, None, {"a": None}, {"a": {"b": None}}],
]


@pytest.mark.parametrize("values", NUMBERS, ids=repr)
def test_values_of_json_stay_as_they_are_written(tmp_path, values):
    """Arrow would make 1.0 of the whole number in [1, 2.5], and refuse others."""
    path = write(tmp_path / "a.jsonl", lines(*({"a": value} for value in values)))
    assert repr([row["a"] for row in read(path)]) == repr(values)
    assert repr([row["a"] for row in read(path, "train[-1:]")]) == repr(values[-1:])


def test_a_key_that_only_some_rows_have_is_null_in_others(tmp_path):
    rows = lines({"a": "1", "b": None}, {"a": "2", "c": {"x": "3"}}, {"c": {"y": "4"}})
    assert read(write(tmp_path / "a.jsonl", rows)) == [
        {"a": "1", "b": None, "c": None},
        {"a": "2", "b": None, "c": {"x": "3"}},
        {"a": None, "b": None, "c": {"y": "4"}},
    ]


@pytest.mark.parametrize("opening", ["[", '{"a":'])
@pytest.mark.parametrize("levels", [49, 50, 51, 52, 400])
def test_a_value_of_many_levels_stays_as_it_is(tmp_path, opening: str, levels: int):
    """Arrow cannot read back what it wrote with more than 64."""
    text = opening * levels + "1" + ("]" if opening == "[" else "}") * levels
    rows = read(write(tmp_path / "a.jsonl", f'{{"a": {text}}}\n'.encode()))
    assert json.dumps(rows[0]["a"], separators=(",", ":")) == text


def test_batches_of_a_long_file_are_read_alike(tmp_path, monkeypatch):
    rows = [{"a": str(i), "n": i if i < 2400 else i + 0.5} for i in range(2500)]
    path = write(tmp_path / "a.jsonl", lines(*rows))
    monkeypatch.setattr("foundry_ext.data.rows._BATCH_CHARACTERS", 1000)
    assert repr(read(path)) == repr(rows)


def test_parquet_of_two_types_is_refused(tmp_path):
    pq.write_table(pa.table({"a": ["1"]}), tmp_path / "train-1.parquet")
    pq.write_table(pa.table({"a": [1.0]}), tmp_path / "train-2.parquet")
    with pytest.raises(UserError, match=r"train-2.parquet: column 'a' is float64, but text in .*1"):
        read(tmp_path)


TYPES = [
    (pa.array(["x"], pa.large_string()), pa.array(["y"])),
    (pa.array(["x"]).dictionary_encode(), pa.array(["y"])),
    (pa.array([1], pa.int32()), pa.array([2**40])),
    (pa.array([0.5], pa.float32()), pa.array([0.1])),
    (pa.array([["x"]], pa.list_(pa.large_string())), pa.array([["y"]])),
    (pa.array([[{"a": "x", "b": "z"}]]), pa.array([[{"a": "x", "b": None}]])),
    (pa.nulls(1), pa.array(["x"])),
]


@pytest.mark.parametrize("values", TYPES, ids=lambda values: str(values[1].type))
def test_parquet_types_that_go_together_become_one(tmp_path, values):
    expected = [{"a": one} for array in values for one in array.to_pylist()]
    for names in (("1", "2"), ("2", "1")):
        for name, array in zip(names, values, strict=True):
            pq.write_table(pa.table({"a": array}), tmp_path / f"train-{name}.parquet")
        assert read(tmp_path) == (expected if names[0] == "1" else expected[::-1])


def test_only_the_columns_asked_for_need_types_that_are_read(tmp_path):
    pairs = pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64()))
    pq.write_table(pa.table({"a": ["1"], "n": ["1"], "m": pairs}), tmp_path / "train-1.parquet")
    pq.write_table(pa.table({"a": ["2"], "n": [True]}), tmp_path / "train-2.parquet")
    for columns in (["a"], "a"):
        assert read(tmp_path, columns=columns) == [{"a": "1"}, {"a": "2"}]
    for columns, message in {
        ("a", "b"): r"hf_kwargs.columns: 'b' is no column of .*train-1.*; the columns are a, n, m",
        (
            "a",
            "n",
        ): r"train-2.parquet: column 'n' is bool, but text in .*train-1.*hf_kwargs.columns",
        ("m",): r"train-1.parquet: column 'm' is map.*hf_kwargs.columns",
    }.items():
        with pytest.raises(UserError, match=message):
            read(tmp_path, columns=list(columns))


def test_parquet_files_may_lack_columns(tmp_path):
    nulls = pa.table({"a": ["1"], "b": pa.nulls(1)})
    pq.write_table(nulls, tmp_path / "train-1.parquet")
    pq.write_table(pa.table({"a": ["2"], "b": ["3"]}), tmp_path / "train-2.parquet")
    pq.write_table(pa.table({"b": ["4"]}), tmp_path / "train-3.parquet")
    rows = [{"a": "1", "b": None}, {"a": "2", "b": "3"}, {"a": None, "b": "4"}]
    assert read(tmp_path) == rows
    assert read(tmp_path, columns=["a"]) == [{"a": row["a"]} for row in rows]


TEXT = "a\r\n\n\nb \u2028 c\rd\n\ne\n"


@pytest.mark.parametrize(
    "hf_kwargs",
    [
        {},
        {"keep_linebreaks": True},
        {"sample_by": "paragraph"},
        {"sample_by": "document"},
        {"encoding": "utf-16"},
    ],
    ids=str,
)
def test_text_is_read_as_datasets_reads_it(tmp_path, hf_kwargs: dict[str, Any]):
    encoding = hf_kwargs.get("encoding", "utf-8")
    files = [str(tmp_path / "a.txt"), write(tmp_path / "b.txt", "\n\nx".encode(encoding))]
    write(tmp_path / "a.txt", TEXT.encode(encoding))
    theirs = datasets.load_dataset(
        "text", data_files=files, split="train", cache_dir=str(tmp_path), **hf_kwargs
    )
    assert len(theirs) > 1
    assert read("text", data_files=files, **hf_kwargs) == list(theirs)


def test_compressed_text_and_a_byte_order_mark_are_read(tmp_path):
    path = write(tmp_path / "a.txt.gz", gzip.compress(b"\xef\xbb\xbfa\nb\n"))
    for hf_kwargs in ({}, {"encoding": "utf-8"}):
        assert read("text", data_files=path, **hf_kwargs) == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize(
    ("content", "hf_kwargs", "message"),
    [
        (b"a\ncaf\xe9\n", {}, "a.txt, line 2: byte 4, 0xe9, is not UTF-8"),
        (b"", {}, "a.txt is empty"),
        (b"a\n", {"encoding": "latin9000"}, "a.txt: hf_kwargs.encoding: 'latin9000' is not a text"),
        (b"a\n", {"sample_by": "word"}, "hf_kwargs.sample_by: 'word'; give line, paragraph, doc"),
    ],
)
def test_a_fault_of_text_is_named(tmp_path, content: bytes, hf_kwargs, message: str):
    with pytest.raises(UserError, match=message):
        read("text", data_files=write(tmp_path / "a.txt", content), **hf_kwargs)


def test_both_forms_of_arrow_files_are_read(tmp_path):
    table = pa.table({"a": ["1"], "n": pa.array([1], pa.int32())})
    with pa.ipc.new_stream(tmp_path / "train-1.arrow", table.schema) as writer:
        writer.write_table(table)
    with pa.ipc.new_file(tmp_path / "train-2.arrow", table.schema) as writer:
        writer.write_table(table)
    assert read(tmp_path) == [{"a": "1", "n": 1}] * 2
    write(tmp_path / "train-3.arrow", b"no arrow")
    with pytest.raises(UserError, match=r"train-3.arrow: .*Arrow"):
        read(tmp_path)


# --- forms of files -------------------------------------------------------------------------------

BOM = b"\xef\xbb\xbf"
FORMS = {
    "a.jsonl": BOM + lines({"a": "é"}, b"", {"a": "2"}),
    "b.jsonl.gz": gzip.compress(lines({"a": "é"}, {"a": "2"})),
    "c.csv": BOM + "a\né\n\n2\n".encode(),
    "d.csv.gz": gzip.compress("a\r\né\r\n2\r\n".encode()),
    "e.json.gz": gzip.compress(BOM + b'[{"a": "\\u00e9"},\n {"a": "2"}]'),
    "f.json": lines({"a": "é"}, {"a": "2"}),
    "g.json": b'{"a":\n"\\u00e9"}\n\n{"a": "2"\n}',
    "h.jsonl.bz2": bz2.compress(lines({"a": "é"}, {"a": "2"})),
    "i.tsv": "a\né\n2\n".encode(),
    "J.JSONL": lines({"a": "é"}, {"a": "2"}),
    "k.json": '["é"]'.encode(),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_read(tmp_path, name: str):
    rows = [{"a": "é"}, {"a": "2"}]
    if name == "k.json":
        rows = [{"text": "é"}]
    assert read(write(tmp_path / name, FORMS[name])) == rows


@pytest.mark.parametrize("encoding", ["utf-8", "UTF8", "utf-8-sig"])
@pytest.mark.parametrize("name", [name for name in FORMS if name[0] in "aceg"])
def test_a_byte_order_mark_is_no_text_under_any_name_of_utf8(tmp_path, name: str, encoding: str):
    content = FORMS[name]
    if not name.endswith(".gz") and not content.startswith(BOM):
        content = BOM + content
    assert read(write(tmp_path / name, content), encoding=encoding) == [{"a": "é"}, {"a": "2"}]


@pytest.mark.parametrize(
    ("name", "content", "hf_kwargs"),
    [
        ("a.csv", b"a;b\n1;2\n", {"delimiter": ";"}),
        ("a.csv", b"a;b\n1;2\n", {"sep": ";", "name": "main", "token": None}),
        ("a.csv", b"1,2\n", {"column_names": ["a", "b"]}),
        ("a.csv", b"x,y\n1,2\n", {"names": ["a", "b"], "header": 0}),
        ("a.csv", b"# made by hand\na,b\n'1',2\n", {"skiprows": 1, "quotechar": "'"}),
        ("a.csv", "a,b\n1,2\n".encode("utf-16"), {"encoding": "utf-16"}),
        ("a.jsonl", lines({"a": "1", "b": "2"}).decode().encode("utf-16"), {"encoding": "utf-16"}),
        ("a.json", b'{"version": 1, "data": [{"a": "1", "b": "2"}]}', {"field": "data"}),
    ],
)
def test_keys_of_load_dataset_work(tmp_path, name: str, content: bytes, hf_kwargs):
    assert read(write(tmp_path / name, content), **hf_kwargs) == [{"a": "1", "b": "2"}]


BAD = {
    "latin1 csv": ("a.csv", b"a\nb\ncaf\xe9\n", {}, r"line 3: byte 4, 0xe9, .*{encoding: latin-1}"),
    "latin1 json": ("a.json", b'[{"a":\n"\xe9"}]', {}, r"line 2: byte 2, 0xe9, .* latin-1"),
    "lone surrogate": (
        *("a.jsonl", lines({"a": "x"}, b'{"a": "x \\ud800 y"}'), {}),
        r"line 2: \\ud800 is half of a character, .*x .* y.*; write both halves",
    ),
    "unknown encoding": ("a.jsonl", b"{}", {"encoding": "latin9000"}, "a.jsonl: .*'latin9000'"),
    "encoding of bytes": ("a.csv", b"a", {"encoding": "base64"}, "a.csv: .*'base64'.*latin-1"),
    "zst": ("a.jsonl.zst", b"(\xb5/\xfd", {}, r"a.jsonl.zst: .zst is not read; .* a.jsonl.gz"),
    "zip": ("a.csv.zip", b"PK", {}, r"a.csv.zip: .zip is not read; .* a.csv.gz"),
    "cut gz": (
        *("a.jsonl.gz", gzip.compress(lines({"a": "x" * 99}))[:-9], {}),
        "a.jsonl.gz cannot be decompressed",
    ),
    "no gz": ("a.jsonl.gz", lines({"a": "x"}), {}, "a.jsonl.gz cannot be decompressed"),
    "no bz2": ("a.jsonl.bz2", lines({"a": "x"}), {}, "a.jsonl.bz2 cannot be decompressed"),
    "broken bz2": (
        *("a.jsonl.bz2", bz2.compress(lines({"a": "x"}))[:-9] + b"123456789", {}),
        "a.jsonl.bz2 cannot be decompressed",
    ),
    "no xz": ("a.csv.xz", b"a\n1\n", {}, "a.csv.xz cannot be decompressed"),
    **{
        f"encoding {encoding}, {name}": (
            *(name, content, {"encoding": encoding}),
            f"hf_kwargs.encoding: {encoding!r} is not .* latin-1",
        )
        for name, content in (("a.csv", b"a\n1\n"), ("a.jsonl", b"{}"), ("a.json", b"[{}]"))
        for encoding in ("latin9000", "base64", 8859)
    },
    "nested too deeply": (
        *("a.jsonl", b'{"a": %s1%s}' % (b"[" * 200_000, b"]" * 200_000), {}),
        "line 1: nested too deeply",
    ),
    "open quote": ("a.csv", b'a,b\n1,2\n"3,4\n', {}, r"line 3: not CSV .*written twice"),
    "a cell too many": ("a.csv", b"a,b\n1,2\n1,2,3\n", {}, r"line 3: 3 cells, but 2 columns"),
    "no header": ("a.csv", b"1,2\n", {"header": 1}, "hf_kwargs.header: 1; .*column_names"),
    "no keys": ("a.jsonl", b"{}\n{}\n", {}, r"line 1: a row without keys"),
    "unknown key": ("a.csv", b"a\n", {"delimeter": ";"}, "hf_kwargs.delimeter is not read .*sep"),
    "key of another kind": ("a.jsonl", b"{}", {"sep": ";"}, "hf_kwargs.sep .* field"),
    "unknown field": ("a.json", b'{"x": []}', {"field": "data"}, "hf_kwargs.field: .*'data'"),
    "broken json": ("a.json", b'[{"a": 1},\n{"a" 2}]', {}, "a.json, line 2: not JSON"),
    "two files' types": (
        "a.jsonl",
        lines({"a": 1}, {"a": [1]}),
        {},
        r"line 2: 'a' is a list, .* a n",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_fault_is_named_with_its_place_and_a_way_out(tmp_path, case: str):
    name, content, hf_kwargs, message = BAD[case]
    with pytest.raises(UserError, match=message) as error:
        read(write(tmp_path / name, content), **hf_kwargs)
    assert "\n" not in str(error.value)
    assert name in str(error.value)


# --- which files are read -------------------------------------------------------------------------


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        is_csv = name.endswith((".csv", ".csv~", ".tsv"))
        write(folder / name, f"a\n{name}\n".encode() if is_csv else lines({"a": name}))
    return folder


FOLDERS = [
    (["b.jsonl", "a.jsonl"], "train", ["a.jsonl", "b.jsonl"]),
    (["train.jsonl", "more.jsonl"], "train", ["more.jsonl", "train.jsonl"]),
    (
        ["train.jsonl", "b.jsonl.bak", "b.jsonl~", ".b.jsonl", "b.jsonl.tmp"],
        "train",
        ["train.jsonl"],
    ),
    (["train.csv", "test.csv", "val.csv"], "validation", ["val.csv"]),
    (["train.csv", "dev-1.csv", "my_valid.csv"], "validation", ["dev-1.csv", "my_valid.csv"]),
    (["train.csv", "Test.csv", "a.eval.csv", "testing 2.csv"], "test", None),
    (["latest.jsonl", "constraint.jsonl", "device.jsonl"], "train", None),
    (["a.jsonl", "val.jsonl"], "val", ["val.jsonl"]),
    (
        ["train/b.jsonl", "train/a.jsonl", "test/a.jsonl"],
        "train",
        ["train/a.jsonl", "train/b.jsonl"],
    ),
    (["test/train.jsonl", "test/b.jsonl"], "test", ["test/b.jsonl"]),
    (["data/train_sft-00000-of-00001.jsonl", "x.jsonl"], "train_sft", None),
    (["train.jsonl", "notes.txt", "README.md", "state.json"], "train", ["train.jsonl"]),
    (["train.jsonl", "test.jsonl"], "train+test", ["train.jsonl", "test.jsonl"]),
    (["train.jsonl", "test.jsonl"], "all", None),
    (["train.csv", "test.jsonl"], "train", ["train.csv"]),
    (["a.jsonl", "LICENSE.TXT", "notes.txt.gz"], "train", ["a.jsonl"]),
    (["a.jsonl", "b.ndjson"], "train", ["a.jsonl", "b.ndjson"]),
]


@pytest.mark.parametrize(("names", "split", "wanted"), FOLDERS)
def test_the_files_of_a_split(tmp_path, names, split: str, wanted):
    expected = {
        "test": ["Test.csv", "a.eval.csv", "testing 2.csv"],
        "train": ["constraint.jsonl", "device.jsonl", "latest.jsonl"],
        "train_sft": ["data/train_sft-00000-of-00001.jsonl"],
        "all": ["test.jsonl", "train.jsonl"],
    }
    found = [row["a"] for row in read(fill(tmp_path, *names), split)]
    assert found == (wanted or expected[split])


def test_splits_whose_types_differ_are_joined(tmp_path):
    one = [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]
    two = [{"a": 0.5, "c": "z"}, {"a": 3, "c": "w"}]
    for suffix in ("jsonl", "parquet", "arrow"):
        folder = tmp_path / suffix
        folder.mkdir()
        for name, rows in {"train": one, "test": two}.items():
            if suffix == "jsonl":
                write(folder / f"{name}.jsonl", lines(*rows))
            elif suffix == "parquet":
                pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
            else:
                table = pa.Table.from_pylist(rows)
                with pa.ipc.new_file(folder / f"{name}.arrow", table.schema) as writer:
                    writer.write_table(table)
        rows = [{"b": None, "c": None, **row} for row in one + two]
        assert read(folder, "train+test") == rows
        assert read(folder, "test[1:]+train[:1]") == [rows[3], rows[0]]
    assert repr([row["a"] for row in read(tmp_path / "jsonl", "train+test")]) == "[1, 2, 0.5, 3]"


def test_splits_of_types_that_do_not_go_together_are_refused(tmp_path):
    write(tmp_path / "train.jsonl", lines({"a": 1}))
    write(tmp_path / "test.csv", b"a\nx\n")
    with pytest.raises(UserError, match=r"split 'train\+test' of .* key a of .*one type"):
        read(tmp_path, "train+test")
    (tmp_path / "test.csv").unlink()
    write(tmp_path / "test.jsonl", lines({"a": "x"}))
    with pytest.raises(
        UserError, match=r"test.jsonl, line 1: 'a' is text, 'x', but a number in .*"
    ):
        read(tmp_path, "train+test")


SPLITS = ["train-sft", "", "train[", "train[:150%]", "train[:1.5%]", "train[:5](odd)", "+train"]


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_that_is_no_name_or_slice_is_refused(tmp_path, split: str):
    path = write(tmp_path / "a.jsonl", lines({"a": "1"}))
    with pytest.raises(UserError, match=r"split '.*' of .*a.jsonl: .* such as train\[:90%\]$"):
        read(path, split)


def test_a_slice_past_the_end_has_no_rows(tmp_path):
    path = write(tmp_path / "a.jsonl", lines({"a": "1"}))
    assert read(path, "train[5:]") == read(path, "train[1:]") == []


def test_what_is_left_out_is_logged(tmp_path, caplog):
    fill(tmp_path, "train.jsonl", "b.jsonl.bak", "test.jsonl", "notes.md")
    with caplog.at_level(logging.INFO, "foundry_ext"):
        read(tmp_path)
    (warning,) = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    assert "not read as rows: b.jsonl.bak, notes.md" in warning
    assert "reads train.jsonl; other splits: test.jsonl" in caplog.text


def test_of_a_saved_data_set_only_its_own_files_are_read(tmp_path):
    """`map` leaves its result beside them."""
    rows = [{"a": "x"}, {"a": "y"}]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "train"))
    saved = datasets.load_from_disk(str(tmp_path / "train"))
    saved.map(lambda row: {"a": row["a"].upper()})
    assert list((tmp_path / "train").glob("cache-*.arrow"))
    (data,) = (tmp_path / "train").glob("data-*.arrow")
    write(tmp_path / "train" / "other.arrow", data.read_bytes())
    assert read(tmp_path / "train") == read(tmp_path) == rows
    (tmp_path / "train" / "other.arrow").unlink()
    (tmp_path / "train" / "state.json").rename(tmp_path / "state.json")
    assert read(tmp_path) == read("arrow", data_files=f"{tmp_path}/train/*.arrow") == rows
    (tmp_path / "state.json").rename(tmp_path / "train" / "state.json")
    data.unlink()
    with pytest.raises(UserError, match=r"train/state.json names data-.*, which is not there"):
        read(tmp_path)


def test_a_file_that_links_lead_to_is_read_once(tmp_path, caplog):
    fill(tmp_path, "v3/z.jsonl", "b.jsonl")
    (tmp_path / "latest").symlink_to("v3")
    for name in "ac":
        (tmp_path / name).symlink_to(".")
    (tmp_path / "v3" / "v2").symlink_to("..")
    (tmp_path / "test.jsonl").symlink_to("b.jsonl")
    assert [row["a"] for row in read(tmp_path)] == ["b.jsonl", "v3/z.jsonl"]
    for name in ("a", "latest/z.jsonl"):
        assert f"is a link: {tmp_path}/{name}" in caplog.text
    assert [row["a"] for row in read(tmp_path, "test")] == ["b.jsonl"]


def test_links_to_files_elsewhere_are_read(tmp_path):
    fill(tmp_path / "blobs", "1", "2")
    for link, blob in {"b": "1", "a": "2", "test": "1"}.items():
        write(tmp_path / "rows" / "README.md", b"")
        (tmp_path / "rows" / f"{link}.jsonl").symlink_to(f"../blobs/{blob}")
    assert [row["a"] for row in read(tmp_path / "rows")] == ["2", "1"]
    assert [row["a"] for row in read(tmp_path / "rows", "test")] == ["1"]


def test_data_files_that_name_a_file_twice_read_it_once(tmp_path, caplog):
    fill(tmp_path / "x", "b.jsonl", "a.jsonl")
    for files in (["b.jsonl", "./b.jsonl", "*"], ["b*", "../x/b.jsonl", "a.jsonl", "**/a*"]):
        caplog.clear()
        rows = read(tmp_path / "x", data_files=files)
        assert [row["a"] for row in rows] == ["b.jsonl", "a.jsonl"]
        assert f"named twice or is a link: {tmp_path}/x" in caplog.text


def test_patterns_work_in_a_folder_whose_name_has_brackets(tmp_path):
    fill(tmp_path / "x[v1]*", "b.jsonl", "a.jsonl", "c.jsonl.bak")
    names = ["a.jsonl", "b.jsonl"]
    for files in ("*", "*.jsonl", "[ab].jsonl", ["a*", "b*"]):
        assert [row["a"] for row in read(tmp_path / "x[v1]*", data_files=files)] == names
    assert [
        row["a"] for row in read("json", data_dir=f"{tmp_path}/x[v1]*", data_files="*")
    ] == names


REFUSED = [
    (["a.jsonl", "b.csv"], "several kinds for split train, a.jsonl, b.csv; .*data_files"),
    (["a.jsonl", "b.json"], "several kinds"),
    (["a.jsonl", "a.jsonl.gz"], "a.jsonl.* is there compressed and plain"),
    (["train_test.jsonl"], "train_test.jsonl: its name stands for test and train"),
    (["val.jsonl"], "split 'train' has no files in .*; there are validation: val.jsonl"),
]


@pytest.mark.parametrize(("names", "message"), REFUSED)
def test_what_is_not_clear_is_refused(tmp_path, names, message: str):
    with pytest.raises(UserError, match=message):
        read(fill(tmp_path, *names))


def test_data_files_may_be_patterns_lists_or_splits(tmp_path, monkeypatch):
    fill(tmp_path / "x", "b.jsonl", "a.jsonl", "c.jsonl.bak")
    monkeypatch.chdir(tmp_path)
    both = ["x/a.jsonl", "x/b.jsonl"]
    names = ["a.jsonl", "b.jsonl"]
    for files in ("x/*", both, {"train": both}, {"test": "x/b.jsonl", "train": "x/*"}):
        assert [row["a"] for row in read("json", data_files=files)] == names
    assert [row["a"] for row in read("x", data_files="b*")] == ["b.jsonl"]
    assert [row["a"] for row in read("json", data_dir="x")] == ["a.jsonl", "b.jsonl"]
    with pytest.raises(FileNotFoundError, match=r"data_files: y.jsonl has no files"):
        read("json", data_files="y.jsonl")


@pytest.mark.parametrize(
    "names",
    [["a.jsonl", "b.json"], ["b.ndjson", "a.jsonl"], ["a.csv", "b.tsv"], ["a.jsonl", "b.data"]],
)
def test_data_files_are_one_kind_if_one_reader_reads_them(tmp_path, names):
    fill(tmp_path, *names)
    builder = "csv" if "a.csv" in names else "json"
    files = [str(tmp_path / name) for name in names]
    assert [row["a"] for row in read(builder, data_files=files)] == names
    assert [row["a"] for row in read(tmp_path, data_files=names)] == names


def test_data_files_of_two_readers_or_of_none_are_refused(tmp_path):
    fill(tmp_path, "a.jsonl", "b.csv", "c.md")
    with pytest.raises(UserError, match=r"several kinds for split train, a.jsonl, b.csv"):
        read(tmp_path, data_files=["a.jsonl", "b.csv"])
    with pytest.raises(
        UserError, match=r"c.md: its name does not end as .*, such as hf_name: json"
    ):
        read(tmp_path, data_files="c.md")


@pytest.mark.parametrize(
    ("hf_kwargs", "message"),
    [
        ({"data_files": "x"}, r"data_files: x is a folder; .* such as x/\*, or .*data_dir"),
        ({"data_dir": "x/a.jsonl"}, r"data_dir: x/a.jsonl is a file; .* hf_kwargs.data_files"),
        ({"data_files": {"train": None}}, "data_files: None; give names"),
        ({"data_files": ["x/a.jsonl", 5]}, r"data_files: \['x/a.jsonl', 5\]; give names"),
    ],
)
def test_a_folder_for_a_file_and_the_reverse_are_refused(tmp_path, monkeypatch, hf_kwargs, message):
    fill(tmp_path, "x/a.jsonl")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        read("json", **hf_kwargs)
    with pytest.raises(FileNotFoundError, match="data_dir: y does not exist"):
        read("json", data_dir="y")


def test_only_the_last_suffix_says_what_separates_cells(tmp_path):
    content = b"a,b\n1\tx,2\n"
    rows = [{"a": "1\tx", "b": "2"}]
    assert read(write(tmp_path / "my.tsv.backup.csv", content)) == rows
    assert read(write(tmp_path / "my.tsv.csv", content)) == rows
    assert read(write(tmp_path / "my.csv.tsv", b"a\tb\n1\t2\n")) == [{"a": "1", "b": "2"}]


def test_the_form_of_a_file_is_part_of_its_key_in_the_cache(tmp_path):
    packed = gzip.compress(lines({"a": "1"}))
    assert read("json", data_files=write(tmp_path / "rows.gz", packed)) == [{"a": "1"}]
    with pytest.raises(UserError, match=r"rows, line 1"):
        read("json", data_files=write(tmp_path / "rows", packed))


def test_a_folder_of_mds_shards_is_sent_to_its_own_keys(tmp_path):
    with MDSWriter(out=str(tmp_path / "train"), columns={"a": "str"}) as out:
        out.write({"a": "x"})
    with pytest.raises(UserError, match=rf"MDS shards; .* set local: {tmp_path}, split: train"):
        read(tmp_path)
    with pytest.raises(UserError, match=rf"MDS shards; .* set local: {tmp_path}/train"):
        read(tmp_path / "train")
