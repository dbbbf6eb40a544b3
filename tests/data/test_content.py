"""Digests of data files: content decides; a note spares reading what cannot have changed."""

import os
import shutil
import time
from pathlib import Path

import datasets.config
import pytest

from foundry_ext.data import content
from foundry_ext.data.content import content_digest

LONG_AGO = 10**9


@pytest.fixture(autouse=True)
def notes(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(content, "_is_local", lambda path: True)
    return tmp_path / "cache" / "foundry_ext" / "digests"


@pytest.fixture
def settle(monkeypatch):
    """Let a minute pass after the last change."""
    now = time.time_ns
    return lambda: monkeypatch.setattr(content.time, "time_ns", lambda: now() + 100 * 10**9)


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """Return the names of files whose content is read, as it happens."""
    read, names = content.read_digest, []
    monkeypatch.setattr(
        content, "read_digest", lambda path: [names.append(path.name), read(path)][1]
    )
    return names


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("the old rows\n")
    return path


def test_bytes_and_order_decide_and_the_place_does_not(tmp_path, path: Path):
    other = tmp_path / "elsewhere" / "b.csv"
    other.parent.mkdir()
    shutil.copyfile(path, other)
    assert content_digest([path]) == content_digest([other]) == content_digest([str(path)])
    assert len(content_digest([path])) == 32
    other.write_text("other rows\n")
    digests = [content_digest(some) for some in ([path], [other], [path, other], [other, path])]
    assert len(set(digests)) == 4
    joined = tmp_path / "joined"
    joined.write_bytes(path.read_bytes() + other.read_bytes())
    assert content_digest([joined]) not in digests


def test_an_unchanged_file_is_read_once(path: Path, settle, reads):
    settle()
    first = content_digest([path])
    assert content_digest([path]) == first
    assert reads == ["rows.jsonl"]


def test_a_word_changed_with_size_and_time_put_back_is_seen(path: Path, settle, reads):
    settle()
    first, before = content_digest([path]), path.stat()
    path.write_text("the new rows\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert content_digest([path]) != first
    assert len(reads) == 2


def test_a_file_put_in_its_place_with_its_time_is_seen(path: Path, settle):
    settle()
    first, before = content_digest([path]), path.stat()
    new = path.with_name("new")
    new.write_text("the new rows\n")
    os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
    new.replace(path)
    assert content_digest([path]) != first


def test_a_link_pointed_elsewhere_is_seen(path: Path, settle, tmp_path):
    settle()
    link, other = tmp_path / "link", tmp_path / "other"
    link.symlink_to(path)
    other.write_text("the new rows\n")
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    first = content_digest([link])
    link.unlink()
    link.symlink_to(other)
    assert content_digest([link]) != first


def test_a_file_that_has_just_changed_is_not_noted(path: Path, reads, notes: Path):
    """A second change within the clock's tick would leave every time as it was."""
    os.utime(path, (LONG_AGO, LONG_AGO))  # ctime is of now, whatever mtime says
    content_digest([path])
    content_digest([path])
    assert len(reads) == 2
    assert not notes.exists()


def test_a_file_that_changes_while_it_is_read_is_not_noted(path: Path, settle, monkeypatch, notes):
    settle()
    read = content.read_digest

    def read_and_append(path: Path) -> str:
        digest = read(path)
        with path.open("a") as file:
            file.write("more\n")
        return digest

    monkeypatch.setattr(content, "read_digest", read_and_append)
    content_digest([path])
    assert not notes.exists()


@pytest.mark.parametrize("note", [b"", b"[1]", b'{"size": 13}', b"\xff\xfe", None])
def test_a_broken_note_is_ignored(path: Path, settle, reads, notes: Path, note):
    settle()
    first = content_digest([path])
    (written,) = notes.iterdir()
    written.unlink()
    written.mkdir() if note is None else written.write_bytes(note)
    assert content_digest([path]) == first
    assert len(reads) == 2


def test_notes_that_cannot_be_written_do_not_matter(path: Path, settle, notes: Path):
    settle()
    notes.parent.parent.mkdir()
    notes.parent.write_text("a file where the folder should be")
    assert content_digest([path]) == content_digest([path])


def test_on_a_network_file_system_content_is_always_read(path: Path, settle, reads, monkeypatch):
    settle()
    monkeypatch.setattr(content, "_is_local", lambda path: False)
    content_digest([path])
    content_digest([path])
    assert len(reads) == 2


@pytest.mark.parametrize(
    ("path", "trusted"),
    [("/home/a/rows", True), ("/data/rows", False), ("/data/scratch/rows", True), ("/x", True)],
)
def test_the_nearest_mount_decides(path: str, trusted: bool, monkeypatch):
    monkeypatch.undo()
    mounts = {"/": "ext4", "/data": "nfs4", "/data/scratch": "xfs"}

    class Mount:
        def __init__(self, mountpoint: str):
            self.mountpoint, self.fstype = mountpoint, mounts[mountpoint]

    monkeypatch.setattr(content.psutil, "disk_partitions", lambda all: list(map(Mount, mounts)))
    assert content._is_local(Path(path)) == trusted


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        content_digest([tmp_path / "missing"])
