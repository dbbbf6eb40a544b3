"""Atomic writes of files and folders."""

import json
from pathlib import Path

import pytest

from foundry_ext.utils.atomic import replaced_file, replaced_folder, write_text


def test_a_file_is_replaced(tmp_path: Path):
    path = tmp_path / "new" / "a.txt"
    write_text(path, "one")
    write_text(path, "two é")
    assert path.read_text(encoding="utf-8") == "two é"
    assert list(path.parent.iterdir()) == [path]


def test_a_lone_surrogate_is_written_as_json_escapes_it(tmp_path: Path):
    write_text(tmp_path / "a", '{"a": "\ud800"}')
    assert json.loads((tmp_path / "a").read_text(encoding="utf-8")) == {"a": "\ud800"}


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
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "left").touch()  # by a killed process
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


def test_the_only_copy_that_a_kill_left_is_put_back(tmp_path: Path):
    path, old = tmp_path / "out", tmp_path / ".out.replaced"
    old.mkdir()
    (old / "only copy").touch()
    with pytest.raises(RuntimeError), replaced_folder(path):
        raise RuntimeError
    assert list(tmp_path.rglob("*")) == [path, path / "only copy"]


def test_files_that_came_meanwhile_are_kept_where_the_folder_must_be_new(tmp_path: Path):
    path = tmp_path / "out"
    path.mkdir()
    with pytest.raises(OSError, match="not empty"), replaced_folder(path, must_be_new=True) as new:
        (path / "theirs").touch()
        (new / "ours").touch()
    assert list(tmp_path.rglob("*")) == [path, path / "theirs"]
    (path / "theirs").unlink()
    with replaced_folder(path, must_be_new=True) as new:
        (new / "ours").touch()
    assert list(tmp_path.rglob("*")) == [path, path / "ours"]


def test_a_rename_that_fails_leaves_the_old_folder(tmp_path: Path, monkeypatch):
    path = tmp_path / "out"
    path.mkdir()
    (path / "old").touch()
    rename = Path.rename

    def full(self: Path, target: Path):
        if self.name == ".out.partial":
            raise OSError("disk")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="disk"), replaced_folder(path):
        pass
    assert list(tmp_path.rglob("*")) == [path, path / "old"]
