"""Atomic writes of files and folders.

Each is written under another name, synced to the disk and renamed. A process that dies leaves
either the old state or the new one, even after a power cut.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replaced_file(path: Path, *, partial: Path | None = None) -> Iterator[Path]:
    """Yield a path to write to; afterwards its content is at `path`, or `path` is untouched.

    Args:
        path: the file to create or replace. Its folder is created if needed.
        partial: where to write, in the same folder; `<name>.partial` by default.
    """
    partial = partial or path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    r"""Write `path` atomically, as UTF-8; a lone surrogate becomes `\ud800`, JSON's escape."""
    with replaced_file(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextlib.contextmanager
def replaced_folder(
    path: Path, *, partial: Path | None = None, must_be_new: bool = False
) -> Iterator[Path]:
    """Yield a folder to fill; afterwards it is at `path`, or `path` is untouched.

    Args:
        path: the folder to create or replace. A folder cannot replace another in one step: a kill
            between the two renames leaves the old one as `.<name>.replaced`, and the next call
            puts it back.
        partial: the folder to fill, beside `path`; `.<name>.partial` by default. Leftovers of an
            earlier process are removed.
        must_be_new: replace an empty folder only.

    Raises:
        OSError: the disk refused, or `must_be_new` and by the end `path` holds files.
    """
    partial = partial or path.with_name(f".{path.name}.partial")
    old = path.with_name(f".{path.name}.replaced")
    _put_back(old, path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for written in (*partial.rglob("*"), partial):
            sync(written)
        if path.exists() and must_be_new:
            path.rmdir()
        elif path.exists():
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        partial.rename(path)
        sync(path.parent)
    except BaseException:
        _put_back(old, path)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _put_back(old: Path, path: Path) -> None:
    if old.exists() and not path.exists():
        old.rename(path)
