"""Atomic writes of files and folders."""

from pathlib import Path

import pytest

from foundry_ext.utils.atomic import replaced_file, replaced_folder, write_text


def test_a_file_is_replaced(tmp_path: Path):
    path = tmp_path / "new" / "a.txt"
    write_text(path, "one")
    write_text(path, "two é")
    assert path.read_text(encoding="utf-8") == "two é"
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), replaced_file(path) as partial:
        partial.write_text("half")
        assert path.read_text() == "old"
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_is_replaced(tmp_path: Path):
    path = tmp_path / "out"
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "left").touch()  # by a killed process
    for content in ("one", "two"):
        with replaced_folder(path) as folder:
            (folder / "below").mkdir()
            (folder / "below" / content).touch()
    assert [file.name for file in path.rglob("*")] == ["below", "two"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_folder_leaves_the_old_one(tmp_path: Path):
    path = tmp_path / "out"
    path.mkdir()
    (path / "old").touch()
    with pytest.raises(RuntimeError), replaced_folder(path) as folder:
        (folder / "new").touch()
        raise RuntimeError
    assert list(tmp_path.rglob("*")) == [path, path / "old"]
