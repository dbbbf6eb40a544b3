"""Atomic checkpoint writes; finds the newest intact checkpoint in a folder.

A file is written beside its place, synced and renamed; the `latest` link is replaced, never
removed. A process that dies anywhere leaves the old state or the new one. Corruption by a disk, a
copy or another program is found by the CRC-32 that torch stores with every tensor.
"""

import errno
import glob
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from composer.utils import parse_uri

from foundry_ext.checkpoints.safe_load import describe_foreign, load_checkpoint
from foundry_ext.utils.atomic import replaced_file, sync
from foundry_ext.utils.errors import UserError

log = logging.getLogger(__name__)

PARTIAL = "partial-"  # a prefix, because the suffix tells Composer how to compress
DAMAGED = "damaged-"
_PLACEHOLDER = re.compile(r"\{\w+\}")
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

    Raises:
        OSError: the file cannot be read, so that nothing is known about it.
    """
    if path.suffix != ".pt":
        return None
    with path.open("rb") as file:
        if file.read(len(ZIP_START)) != ZIP_START:
            return "is empty" if path.stat().st_size == 0 else "does not begin as a checkpoint"
    try:
        with zipfile.ZipFile(path) as archive:
            corrupted = archive.testzip()
        torch._C.PyTorchFileReader(str(path))  # stricter about the table at the end; loads nothing
    except (zipfile.BadZipFile, EOFError, RuntimeError, ValueError, NotImplementedError) as error:
        return f"cannot be read to its end ({str(error).partition(chr(10))[0]})"
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):  # zipfile seeks to where a cut table says
            raise
        return f"cannot be read to its end ({error})"
    return f"is corrupted in {corrupted}" if corrupted else foreign_content(path)


def foreign_content(path: Path) -> str | None:
    """Return what a readable torch file holds instead of a run's state, or None."""
    try:
        content: Any = load_checkpoint(path, mmap=True)
    except Exception:  # classes of the user's own, or a disk that cannot be mapped
        return None
    return describe_foreign(content)


def find_checkpoints(folder: Path, template: str) -> list[Path]:
    """Return files named like `template`, oldest first by its numbers.

    Folders below are another run's, unless the template itself has one. Links are passed over.

    >>> find_checkpoints(Path("."), "ba{batch}.pt")  # given ba2.pt and ba10.pt
    [PosixPath('ba2.pt'), PosixPath('ba10.pt')]
    """
    checkpoints = []
    for path, numbers in _named_like(folder, template):
        if path.is_file() and not path.is_symlink():
            checkpoints.append((numbers, path))
    return [path for _, path in sorted(checkpoints)]


def links_named_like(folder: Path, template: str) -> list[Path]:
    """Return links that are named like checkpoints, which a user has put there."""
    return [path for path, _ in _named_like(folder, template) if path.is_symlink()]


def _named_like(
    folder: Path, template: str, prefix: str = ""
) -> Iterator[tuple[Path, tuple[int, ...]]]:
    """Yield (path, its numbers) of what is named like the template, with a prefix to its name."""
    above, _, name = template.rpartition("/")
    template = f"{above}/{prefix}{name}" if above else prefix + name
    for path in folder.glob("*".join(map(glob.escape, _PLACEHOLDER.split(template)))):
        numbers = _numbers(path.relative_to(folder).as_posix(), template)
        if numbers is not None:
            yield path, numbers


def _numbers(name: str, template: str) -> tuple[int, ...] | None:
    """Return the numbers in a name, or None if it is not named like the template."""
    pattern = r"(\d+)".join(map(re.escape, _PLACEHOLDER.split(template)))
    match = re.fullmatch(pattern, name)
    return tuple(map(int, match.groups())) if match else None


def check_none_later(folder: Path, template: str, now: str) -> None:
    """Check that a run that starts from a checkpoint in its own folder overwrites no later one.

    Composer's own check fails on {run_name} in the template.

    Args:
        folder: the run's folder.
        template: the names of its checkpoints, such as "ep{epoch}-ba{batch}.pt".
        now: the path under which the run would save its present state.

    Raises:
        UserError: there is a later checkpoint.
    """
    *_, newest = [None, *find_checkpoints(folder, template)]
    if newest is None:
        return
    found, present = (
        _numbers(path.relative_to(folder).as_posix(), template) for path in (newest, Path(now))
    )
    assert found is not None and present is not None
    if found > present:
        raise UserError(
            f"save_folder: {newest} is later than the checkpoint that load_path names, and would"
            " be overwritten; continue from it with autoresume: true, name another save_folder, or"
            " set save_overwrite: true"
        )


def has_any(folder: Path, template: str, *, besides: Path | None) -> bool:
    """Return whether there are checkpoints, or links to deleted ones, other than `besides`.

    Looked for where `template` would put them, not in folders of other runs below. What a killed
    process had begun to write is none.
    """
    above = template.rpartition("/")[0]
    places = [folder, *(folder.glob(re.sub(r"\{\w+\}", "*", above)) if above else [])]
    begun = {path for path, _ in _named_like(folder, template, PARTIAL)}
    paths = {path for place in places for path in place.glob("*.pt")} - begun
    return any(besides is None or path.resolve() != besides.resolve() for path in paths)


def newest_intact(paths: list[Path]) -> tuple[list[Path], dict[Path, str]]:
    """Return `paths`, oldest first, up to the newest intact one, and what is wrong with later ones.

    One that cannot be read, for lack of permission, is named and passed over; nothing is known
    about it.

    Raises:
        UserError: none is intact.
    """
    problems: dict[Path, str] = {}
    unreadable: dict[Path, str] = {}
    intact = list(paths)
    while intact:
        try:
            problem = damage(intact[-1])
        except OSError as error:
            path = intact.pop()
            unreadable[path] = f"cannot be read ({error.strerror or error})"
            log.warning("checkpoint %s %s: passed over", path, unreadable[path])
            continue
        if problem is None:
            break
        problems[intact.pop()] = problem
    if paths and not intact:
        faults = problems | unreadable
        details = ", ".join(f"{path.name} {problem}" for path, problem in faults.items())
        raise UserError(
            f"{paths[0].parent}: no checkpoint is intact, so the run cannot continue ({details});"
            " restore one, or move the folder away to start again"
        )
    return intact, problems


def set_aside(problems: Mapping[Path, str], *, intact: Path) -> None:
    """Rename damaged checkpoints, so that training can write there again, and report them."""
    for path, problem in problems.items():
        aside = path.with_name(DAMAGED + path.name)
        log.warning(
            "checkpoint %s %s; renamed to %s, continuing from %s",
            *(path, problem, aside.name, intact.name),
        )
        os.replace(path, aside)


def remove_partial(folder: Path, template: str, latest: str) -> None:
    """Remove checkpoints and links that a killed process of this run had begun to write.

    Args:
        folder: the run's own; folders below are another run's, unless the template has one.
        template: the names of its checkpoints.
        latest: the name of its link.
    """
    link = Path(latest)
    paths = [path for path, _ in _named_like(folder, template, PARTIAL)]
    for path in [*paths, folder / link.with_name(PARTIAL + link.name)]:
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


def is_disk_full(error: BaseException) -> bool:
    """Return whether a write failed for lack of space; torch says only that it failed."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    said = ("file write failed", "unexpected pos", "No space left")  # of torch, of safetensors
    return any(text in str(error) for text in said)


def describe_full(path: Path, saved: Sequence[str]) -> str:
    """Return an error for a disk without room for the checkpoint `path`, after those in `saved`."""
    earlier = f"{saved[-1]} is intact" if saved else "there is no earlier checkpoint"
    free = shutil.disk_usage(path.parent).free / 1e9
    return (
        f"no space left on the disk of save_folder for {path.name} ({free:.2f} GB free);"
        f" {earlier}. Free some space and run the same command again"
    )
