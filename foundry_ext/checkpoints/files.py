"""Atomic checkpoint writes; finds the newest intact checkpoint in a folder.

A file is written beside its place, synced and renamed; the `latest` link is replaced, never
removed. A process that dies anywhere leaves the old state or the new one. Corruption by a disk, a
copy or another program is found by the CRC-32 that torch stores with every tensor.
"""

import errno
import logging
import os
import re
import zipfile
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from composer.utils import parse_uri

from foundry_ext.utils.atomic import replaced_file, sync
from foundry_ext.utils.errors import UserError

log = logging.getLogger(__name__)

PARTIAL = "partial-"  # a prefix, because the suffix tells Composer how to compress
DAMAGED = "damaged-"
ZIP_START = b"PK\x03\x04"


def replaced_checkpoint(path: Path) -> AbstractContextManager[Path]:
    """Return `replaced_file`, writing to a name whose suffix still tells Composer's compression."""
    return replaced_file(path, partial=path.with_name(PARTIAL + path.name))


def link_to(target: Path, link: Path) -> None:
    """Point `link` to `target` in one step, so that the link never vanishes."""
    partial = link.with_name(PARTIAL + link.name)
    partial.unlink(missing_ok=True)
    partial.symlink_to(os.path.relpath(target, link.parent))
    os.replace(partial, link)
    sync(link.parent)


def damage(path: Path) -> str | None:
    """Return what is wrong with a torch checkpoint, or None; other formats are not checked.

    Reads all of it: about one second per gigabyte from a fast disk.
    """
    if path.suffix != ".pt":
        return None
    try:
        with path.open("rb") as file:
            if file.read(len(ZIP_START)) != ZIP_START:
                return "is empty" if path.stat().st_size == 0 else "does not begin as a checkpoint"
        with zipfile.ZipFile(path) as archive:
            corrupted = archive.testzip()
        torch._C.PyTorchFileReader(str(path))  # stricter about the table at the end; loads nothing
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError) as error:
        return f"cannot be read to its end ({str(error).partition(chr(10))[0]})"
    return f"is corrupted in {corrupted}" if corrupted else None


def find_checkpoints(folder: Path, template: str) -> list[Path]:
    """Return files named like `template`, oldest first by its numbers.

    >>> find_checkpoints(Path("."), "ba{batch}.pt")  # given ba2.pt and ba10.pt
    [PosixPath('ba2.pt'), PosixPath('ba10.pt')]
    """
    parts = re.split(r"\{\w+\}", template)
    pattern = re.compile(r"(\d+)".join(map(re.escape, parts)))
    checkpoints = []
    for path in folder.rglob("*"):
        match = pattern.fullmatch(path.relative_to(folder).as_posix())
        if match and path.is_file() and not path.is_symlink():
            checkpoints.append((tuple(map(int, match.groups())), path))
    return [path for _, path in sorted(checkpoints)]


def has_any(folder: Path, *, besides: Path | None) -> bool:
    """Return whether there are checkpoints, or links to deleted ones, other than `besides`."""
    paths = (path for path in folder.rglob("*") if path.suffix == ".pt")
    return any(besides is None or path.resolve() != besides.resolve() for path in paths)


def keep_intact(paths: list[Path]) -> list[Path]:
    """Return `paths`, oldest first, up to the newest intact one.

    Damaged ones after it are reported and renamed, so that training can write there again.

    Raises:
        UserError: all are damaged; they keep their names.
    """
    problems: dict[Path, str] = {}
    intact = list(paths)
    while intact and (problem := damage(intact[-1])) is not None:
        problems[intact.pop()] = problem
    if paths and not intact:
        details = ", ".join(f"{path.name} {problem}" for path, problem in problems.items())
        raise UserError(
            f"{paths[0].parent}: all checkpoints are damaged, so the run cannot continue"
            f" ({details}); restore one, or move the folder away to start again"
        )
    for path, problem in problems.items():
        aside = path.with_name(DAMAGED + path.name)
        log.warning(
            "checkpoint %s %s; renamed to %s, continuing from %s",
            *(path, problem, aside.name, intact[-1].name),
        )
        os.replace(path, aside)
    return intact


def remove_partial(folder: Path) -> None:
    """Remove files that a killed process had begun to write."""
    for path in folder.rglob(PARTIAL + "*"):
        if path.is_symlink() or path.is_file():
            path.unlink()


def check_folder(folder: str | None) -> str:
    if folder is None:
        raise UserError("exact_resume: save_folder is missing; set it, or remove exact_resume")
    if parse_uri(folder)[0]:
        raise UserError(
            f"exact_resume: save_folder {folder} must be a folder on this machine's disks; name"
            " one, or remove exact_resume to save as Composer does"
        )
    return folder


def is_disk_full(error: BaseException, folder: Path) -> bool:
    """Return whether a write failed for lack of space; torch says only that it failed."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "file write failed" in str(error) or "unexpected pos" in str(error)
