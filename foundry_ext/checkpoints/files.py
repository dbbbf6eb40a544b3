"""Checkpoint files that are whole or not there, and which of a folder's is the newest whole one.

A file is written beside its place, synced and renamed; `latest` is a link that is replaced, never
removed. So a process that dies anywhere leaves the old state or the new one. What a disk, a copy or
another program has spoilt is found by the CRC-32 that torch stores with every tensor.
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

PARTIAL = "partial-"  # before the name: what follows it says how Composer compresses
DAMAGED = "damaged-"
ZIP_START = b"PK\x03\x04"


def replaced_checkpoint(path: Path) -> AbstractContextManager[Path]:
    """Return `replaced_file`, writing to a name whose suffix still tells Composer's compression."""
    return replaced_file(path, partial=path.with_name(PARTIAL + path.name))


def link_to(target: Path, link: Path) -> None:
    """Makes `link` point to `target`, in one step: there is no moment without a link."""
    partial = link.with_name(PARTIAL + link.name)
    partial.unlink(missing_ok=True)
    partial.symlink_to(os.path.relpath(target, link.parent))
    os.replace(partial, link)
    sync(link.parent)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint of torch, or None; other formats are taken as they are.

    Reads all of it: about a second a gigabyte from a fast disk.
    """
    if path.suffix != ".pt":
        return None
    try:
        with path.open("rb") as file:
            if file.read(len(ZIP_START)) != ZIP_START:
                return "is empty" if path.stat().st_size == 0 else "does not begin as a checkpoint"
        with zipfile.ZipFile(path) as archive:
            spoilt = archive.testzip()
        torch._C.PyTorchFileReader(str(path))  # stricter about the table at its end; loads nothing
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError) as error:
        return f"cannot be read to its end ({str(error).partition(chr(10))[0]})"
    return f"is spoilt in {spoilt}" if spoilt else None


def find_checkpoints(folder: Path, template: str) -> list[Path]:
    """Files named like `template`, ep{epoch}-ba{batch}-rank{rank}.pt, oldest first by its numbers.

    >>> find_checkpoints(Path("."), "ba{batch}.pt")  # where there are ba2.pt, ba10.pt
    [PosixPath('ba2.pt'), PosixPath('ba10.pt')]
    """
    parts = re.split(r"\{\w+\}", template)
    pattern = re.compile(r"(\d+)".join(map(re.escape, parts)))
    found = []
    for path in folder.rglob("*"):
        match = pattern.fullmatch(path.relative_to(folder).as_posix())
        if match and path.is_file() and not path.is_symlink():
            found.append((tuple(map(int, match.groups())), path))
    return [path for _, path in sorted(found)]


def has_any(folder: Path, *, besides: Path | None) -> bool:
    """Files of checkpoints, whatever their names, or links to what is gone."""
    found = (path for path in folder.rglob("*") if path.suffix == ".pt")
    return any(besides is None or path.resolve() != besides.resolve() for path in found)


def keep_whole(paths: list[Path]) -> list[Path]:
    """`paths`, oldest first, up to the newest whole one; damaged ones after it are named and get
    another name, so that training can write there again.

    Raises:
        UserError: there are some and none is whole; they keep their names.
    """
    problems: dict[Path, str] = {}
    kept = list(paths)
    while kept and (problem := damage(kept[-1])) is not None:
        problems[kept.pop()] = problem
    if paths and not kept:
        found = ", ".join(f"{path.name} {problem}" for path, problem in problems.items())
        raise UserError(
            f"{paths[0].parent}: no checkpoint in it is whole, so the run cannot go on where it"
            f" stopped ({found}); restore one, or move the folder away to begin anew"
        )
    for path, problem in problems.items():
        aside = path.with_name(DAMAGED + path.name)
        log.warning(
            "checkpoint %s %s; renamed to %s, going on from %s",
            *(path, problem, aside.name, kept[-1].name),
        )
        os.replace(path, aside)
    return kept


def remove_partial(folder: Path) -> None:
    """What a killed process had begun to write."""
    for path in folder.rglob(PARTIAL + "*"):
        if path.is_symlink() or path.is_file():
            path.unlink()


def check_folder(folder: str | None) -> str:
    if folder is None:
        raise UserError(
            "exact_resume: save_folder is missing; say where the checkpoints go, or leave out"
            " exact_resume"
        )
    if parse_uri(folder)[0]:
        raise UserError(
            f"exact_resume: save_folder {folder} is not a folder on this machine's disks; name one,"
            " or leave out exact_resume for Composer's own way of saving"
        )
    return folder


def is_disk_full(error: BaseException, folder: Path) -> bool:
    """torch says only that a write failed."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "file write failed" in str(error) or "unexpected pos" in str(error)
