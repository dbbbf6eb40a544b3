"""Files of JSON lines."""

from pathlib import Path

import pytest

from foundry_ext.utils.errors import UserError
from foundry_ext.utils.json_lines import open_lines, read_lines


def write(folder: Path, content: bytes) -> Path:
    path = folder / "a.jsonl"
    path.write_bytes(content)
    return path


def test_lines_are_numbered_and_blank_ones_skipped(tmp_path):
    path = write(tmp_path, b'{"a": 1}\n\n[2]\n3')
    assert list(read_lines(path)) == [(1, {"a": 1}), (3, [2]), (4, 3)]


@pytest.mark.parametrize("line", [b'{"a": ', b"\xff", b"[" * 100_000])
def test_a_line_that_is_not_json_is_named(tmp_path, line):
    path = write(tmp_path, b"1\n" + line + b"\n")
    for growing in (False, True):  # a line with its newline is complete
        with pytest.raises(UserError, match=r"line 2: not JSON"):
            list(read_lines(path, growing=growing))


def test_an_unfinished_last_line_is_skipped_on_demand(tmp_path):
    path = write(tmp_path, b'1\n{"a": ')
    assert list(read_lines(path, growing=True)) == [(1, 1)]
    with pytest.raises(UserError, match="line 2"):
        list(read_lines(path))


def test_a_resumed_file_continues_after_its_last_whole_line(tmp_path):
    path = write(tmp_path, b'1\n{"a": ')
    with open_lines(path, resumed=True) as file:
        file.write("2\n")
    assert path.read_text() == "1\n2\n"
    open_lines(path, resumed=False).close()
    assert path.read_text() == ""
