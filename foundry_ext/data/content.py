"""Identity of data files: a digest of their bytes, never their names or times.

Reading a large file at every start takes long, so its digest is noted in the cache folder of
`datasets`:

    foundry_ext/digests/<hash of the path>.json   {path, size, mtime_ns, ctime_ns, inode, digest}

A note spares the reading only if all five parts are equal. The time of the last change, ctime_ns,
cannot be set back as mtime_ns can (`touch -r`, `cp -p`, `rsync -t`). Where the file system does not
keep these parts reliably, every start reads the content.
"""

import contextlib
import json
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets.config
import psutil
import xxhash

from foundry_ext.utils.atomic import replaced_file

# On others, such as nfs, another machine's write may be seen late in a file's times.
_LOCAL = frozenset(("apfs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "tmpfs", "xfs", "zfs"))
# A change within one tick of the file system's clock leaves all times equal (2 s on the coarsest),
# and one through a memory map may be stamped when the page is written out, after 30 s.
_SETTLED_SECONDS = 60
_BLOCK_BYTES = 2**20


def content_digest(paths: Sequence[Path]) -> str:
    """Return a digest of the files' bytes, in this order, as 32 hex digits.

    Copies of the files in other places have the same digest.

    Raises:
        OSError: a file does not exist or cannot be read.
    """
    parts = "".join(_file_digest(Path(path).resolve()) for path in paths)
    return xxhash.xxh3_128(parts.encode()).hexdigest()


def _file_digest(path: Path) -> str:
    if not _is_local(path):
        return read_digest(path)
    note = _note_path(path)
    before = _describe(path)
    noted = _read_note(note)
    if all(noted.get(key) == value for key, value in before.items()) and "digest" in noted:
        return noted["digest"]
    digest = read_digest(path)
    changed = max(before["mtime_ns"], before["ctime_ns"])
    if _describe(path) == before and changed < time.time_ns() - _SETTLED_SECONDS * 10**9:
        _write_note(note, {**before, "digest": digest})
    return digest


def read_digest(path: Path) -> str:
    """Return a digest of a file's bytes, which are always read."""
    with path.open("rb") as file:
        digest = xxhash.xxh3_128()
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _describe(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {
        "path": str(path),
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
        "inode": status.st_ino,
    }


def _note_path(path: Path) -> Path:
    name = xxhash.xxh3_128(str(path).encode(errors="surrogateescape")).hexdigest()
    return Path(datasets.config.HF_DATASETS_CACHE, "foundry_ext", "digests", f"{name}.json")


def _read_note(note: Path) -> dict[str, Any]:
    try:
        content = json.loads(note.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_note(note: Path, content: dict[str, Any]) -> None:
    partial = note.with_name(f"{note.stem}.{uuid.uuid4().hex}.partial")  # ranks write at once
    with contextlib.suppress(OSError), replaced_file(note, partial=partial) as file:
        file.write_text(json.dumps(content), encoding="utf-8")


def _is_local(path: Path) -> bool:
    """Return whether the file lies on a file system whose times and inodes can be trusted."""
    kinds = {mount.mountpoint: mount.fstype for mount in psutil.disk_partitions(all=True)}
    return next((kinds[str(at)] for at in path.parents if str(at) in kinds), "") in _LOCAL
