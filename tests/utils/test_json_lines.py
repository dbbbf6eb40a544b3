"""Files of JSON lines."""

import errno
import io
from pathlib import Path

import pytest

from foundry_ext.utils.errors import UserError
from foundry_ext.utils.json_lines import HeldLines, open_lines, read_lines


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


def test_lines_are_held_back_until_the_file_may_be_opened(tmp_path):
    path = write(tmp_path, b'1\n{"a": ')
    lines = HeldLines(path)
    lines.write([2, 3])
    assert path.read_bytes() == b'1\n{"a": '
    lines.open(resumed=True)
    assert path.read_text() == "1\n2\n3\n"
    lines.open(resumed=False)  # it is open
    lines.write([4])
    assert path.read_text() == "1\n2\n3\n4\n", "a kill would lose nothing"
    lines.close()


def test_a_full_disk_names_the_file(tmp_path):
    lines = HeldLines(tmp_path / "a.jsonl")
    lines.open(resumed=False)
    # Every write to this device fails. Without a buffer nothing is left to be written at its end.
    lines._file = io.TextIOWrapper(io.FileIO("/dev/full", "a"), write_through=True)  # pyright: ignore
    with pytest.raises(OSError) as full:
        lines.write([1])
    assert (full.value.errno, full.value.filename) == (errno.ENOSPC, str(tmp_path / "a.jsonl"))
