"""Pieces: every row once, in order; known by content; cut at the same places."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foundry_ext.data.json_lines import read_json
from foundry_ext.data.prepared.pieces import describe_pieces, split_files, split_table
from foundry_ext.utils.errors import UserError


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def all_rows(pieces) -> list[dict]:
    return [row for piece in pieces for _, row in piece.rows()]


texts = st.lists(st.text(max_size=30), min_size=1, max_size=20)


@settings(max_examples=60, deadline=None)
@given(texts=texts, piece_bytes=st.integers(1, 200), ends_with_a_break=st.booleans())
def test_lines_are_read_once_and_in_order(tmp_path_factory, texts, piece_bytes, ends_with_a_break):
    path = tmp_path_factory.mktemp("lines") / "rows.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_text("\n".join(lines) + "\n" * ends_with_a_break, encoding="utf-8", newline="")
    pieces = split_files([path], {}, piece_bytes)
    assert pieces is not None
    assert all_rows(pieces) == [row.values for row in read_json(path)]
    assert sum(piece.size for piece in pieces) == path.stat().st_size


def test_blank_lines_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n \n{"text": "b"}\n\n')
    for piece_bytes in range(1, 40):
        assert all_rows(split_files([path], {}, piece_bytes) or []) == [
            {"text": "a"},
            {"text": "b"},
        ]


def test_added_rows_change_the_last_piece_only(tmp_path):
    rows = [{"text": f"row {number}"} for number in range(50)]
    before = split_files([write_lines(tmp_path / "a.jsonl", rows)], {}, 200)
    after = split_files([write_lines(tmp_path / "b.jsonl", [*rows, {"text": "new"}])], {}, 200)
    assert before and after and len(before) > 3
    same = [one.digest() == other.digest() for one, other in zip(before, after, strict=False)]
    assert same[:-1] == [True] * (len(before) - 1)
    assert not same[-1] or len(after) == len(before) + 1


def test_error_names_the_line_in_the_file(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [{"text": f"row {i}"} for i in range(40)])
    path.write_text(path.read_text(encoding="utf-8") + "{bad\n", encoding="utf-8")
    *_, last = split_files([path], {}, 100) or []
    with pytest.raises(UserError, match=r"rows\.jsonl, line 41: not JSON"):
        list(last.located().rows())


@pytest.mark.parametrize("compression", ["snappy", "zstd"])
def test_row_groups_are_read_once_and_in_order(tmp_path, compression):
    rows = [{"text": f"row {number}", "id": number} for number in range(95)]
    files = []
    for number, part in enumerate((rows[:60], rows[60:])):
        files.append(tmp_path / f"{number}.parquet")
        pq.write_table(
            pa.Table.from_pylist(part), files[-1], row_group_size=10, compression=compression
        )
    pieces = split_files(files, {}, 600)
    assert pieces and len(pieces) > len(files)
    assert all_rows(pieces) == rows
    places = [place for piece in pieces for place, _ in piece.rows()]
    assert places[61] == f"{files[1]}, row 1"
    copy = tmp_path / "copy.parquet"
    copy.write_bytes(files[0].read_bytes())
    copied = split_files([copy], {}, 600) or []
    assert [p.digest() for p in copied] == [p.digest() for p in pieces[: len(copied)]]
    assert len({piece.digest() for piece in pieces}) == len(pieces)


def test_columns_of_all_files_and_those_asked_for(tmp_path):
    files = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    pq.write_table(pa.Table.from_pylist([{"text": "a", "id": 1}]), files[0])
    pq.write_table(pa.Table.from_pylist([{"text": "b", "more": "x"}]), files[1])
    pieces = split_files(files, {}, 1) or []
    assert all_rows(pieces) == [
        {"text": "a", "id": 1, "more": None},
        {"text": "b", "id": None, "more": "x"},
    ]
    pieces = split_files(files, {"columns": ["text"]}, 1) or []
    assert all_rows(pieces) == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.csv", "rows.json"])
def test_other_files_are_not_read_in_parts(tmp_path, name):
    assert split_files([tmp_path / name], {}, 10) is None


def test_rows_of_a_table(tmp_path):
    rows = [{"text": f"row {number}"} for number in range(40)]
    table = datasets.Dataset.from_list(rows)
    pieces = split_table(table, "some/name", 50)
    assert len(pieces) > 3
    assert all_rows(pieces) == rows
    more = split_table(datasets.Dataset.from_list([*rows, {"text": "new"}]), "other", 50)
    assert [p.digest() for p in pieces[:-1]] == [p.digest() for p in more[: len(pieces) - 1]]


def test_description_changes_with_the_place(tmp_path):
    rows = [{"text": "a"}]
    a = split_files([write_lines(tmp_path / "a.jsonl", rows)], {}, 100) or []
    b = split_files([write_lines(tmp_path / "b.jsonl", rows)], {}, 100) or []
    assert describe_pieces(a) != describe_pieces(b)
    assert a[0].digest() == b[0].digest()
