"""Cache of tokenised rows on disk, keyed by everything that decides the tokens.

<cache folder of `datasets`>/foundry_ext/<key>/   the table's Arrow files and whole.json

The key is a hash of content: the same rows in another file, or in a touched one, are found again.
A folder is renamed to its key after all of it is on the disk, so a killed writer leaves nothing
that looks like a table. Locks only spare work: where a file system has none, each writer fills a
folder of its own, and the first one to rename it wins.
"""

import contextlib
import errno
import importlib.metadata
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import datasets.config
import filelock
import pyarrow as pa
import xxhash
from datasets.fingerprint import Hasher
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from foundry_ext.data.batches import row_sizes, split_rows
from foundry_ext.data.full_disk import naming_full_disk
from foundry_ext.data.preprocessing import module_sources
from foundry_ext.utils.atomic import replaced_folder
from foundry_ext.utils.errors import UserError, one_line
from foundry_ext.utils.processes import is_running, machine_name

log = logging.getLogger(__name__)
T = TypeVar("T")

_FORMAT_VERSION = 2  # of the table and of the key
DECIDING_PACKAGES = ("llm-foundry", "tokenizers", "transformers")
_WHOLE = "whole.json"
_MISSING, _DAMAGED = "missing", "damaged"
_OLD = 2 * 24 * 3600.0  # seconds
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
# Rows per hashed batch. Measured: 5 GB/s with 1,000 to 10,000 short rows, 1 GB/s with 100,000,
# which no longer fit the CPU's caches.
_HASHED_ROWS = 1000
# More than a thousand rows of any text but books have: other batches would be other keys.
_HASHED_BYTES = 2**26


class DamagedTableError(Exception):
    """A table in the cache that is not what was written; it can be made anew."""


def table_key(
    rows: datasets.Dataset | str,
    tokenizer: PreTrainedTokenizerBase,
    settings: dict[str, Any],
    preprocess: Callable[..., Any] | None,
) -> str:
    """Return a hash of rows, tokenizer, settings, preprocessing's source and versions.

    `rows` may be a digest of rows that are no `datasets.Dataset`.
    """
    content = rows if isinstance(rows, str) else hash_rows(rows)
    versions = [_FORMAT_VERSION, *map(importlib.metadata.version, DECIDING_PACKAGES)]
    # Pickling keeps only a function's name.
    formatting = [preprocess, sorted(module_sources(preprocess).items())]
    return Hasher.hash([content, hash_tokenizer(tokenizer), settings, formatting, versions])


def cached(key: str, write: Callable[[Path], None]) -> Path:
    """Return the folder of a key; if it is missing, `write` fills it first, in one process.

    Others that need the same table wait for it, on all ranks and in all runs of a machine.

    Raises:
        OSError: the disk is full; names the folder, the space left and the variable that moves it.
    """
    folder = _folder(key)
    if _find_fault(folder) is not None:
        with _filled(folder, write):
            pass
    return folder


def read_cached(key: str, write: Callable[[Path], None], read: Callable[[Path], T]) -> T:
    """Return what `read` makes of the folder of a key; a missing or damaged one is made anew.

    Args:
        key: as in `cached`.
        write: fills the folder.
        read: reads it, and raises DamagedTableError if it is not what was written. Any other error
            has the same effect, except those of the machine, such as too many open files.

    Raises:
        UserError: the folder is damaged and cannot be changed.
        DamagedTableError: it is damaged as soon as it has been made.
    """
    folder = cached(key, write)
    try:
        return _read(folder, read)
    except DamagedTableError as error:
        if not discard(folder, str(error)):
            raise UserError(f"cache {folder}: {error}; delete this folder") from error
    # Read before the lock is released, so that no other process replaces it in between.
    with _filled(folder, write):
        return _read(folder, read)


def find_cached(key: str, read: Callable[[Path], T]) -> T | None:
    """Return what `read` makes of the folder of a key, or None if it is missing or damaged."""
    folder = _folder(key)
    if _find_fault(folder) is None:
        with contextlib.suppress(DamagedTableError):
            return _read(folder, read)
    return None


def _folder(key: str) -> Path:
    return Path(datasets.config.HF_DATASETS_CACHE, "foundry_ext", key)


def _read(folder: Path, read: Callable[[Path], T]) -> T:
    try:
        return read(folder)
    except (DamagedTableError, MemoryError):
        raise
    except Exception as error:  # whatever a reader makes of damaged bytes
        # Arrow's errors about the content have no number.
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT, errno.EIO):
            raise
        raise DamagedTableError(f"it cannot be read ({one_line(error)})") from error


def discard(folder: Path, reason: str) -> bool:
    """Mark a damaged table, so that the next run makes it anew; return whether that was possible.

    Its files stay until then, because other runs may read them.
    """
    partial = folder / f"{_WHOLE}.{uuid.uuid4().hex}.partial"
    try:
        partial.write_text(json.dumps({_DAMAGED: reason}), encoding="utf-8")
        partial.replace(folder / _WHOLE)
    except FileNotFoundError:  # another process has removed the folder to make it anew
        return True
    except OSError:  # such as a read-only file system
        return False
    return True


@contextlib.contextmanager
def _filled(folder: Path, write: Callable[[Path], None]) -> Iterator[None]:
    """Fill the folder if it is not whole, and keep other writers out until the block ends."""
    with naming_full_disk():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock")):
            fault = _find_fault(folder)
            if fault is not None:
                _fill(folder, write, fault)
            yield


def _locked(path: Path) -> contextlib.AbstractContextManager[Any]:
    """Return the lock of a key, or one that does nothing if the file system has no locks."""
    lock = filelock.FileLock(path, fallback_to_soft=False)  # a soft one outlives a killed process
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        log.warning("another process is tokenizing the same rows; waiting for it (%s)", path)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        log.warning("%s: no locks here; processes may tokenize the same rows at once", path.parent)
        return contextlib.nullcontext()
    else:
        lock.release()
    return lock


def _fill(folder: Path, write: Callable[[Path], None], fault: str) -> None:
    """Fill the folder, unless another writer, which no lock kept out, completes it earlier."""
    if fault != _MISSING:
        log.warning("%s: %s; making it anew", folder, fault)
        shutil.rmtree(folder, ignore_errors=True)
    for part in folder.parent.glob(f"{folder.name}.*.part"):
        if _is_dead(part, folder.name):
            shutil.rmtree(part, ignore_errors=True)
    name = f"{folder.name}.{machine_name()}.{os.getpid()}.{uuid.uuid4().hex}.part"
    try:
        with replaced_folder(folder, partial=folder.with_name(name), must_be_new=True) as part:
            write(part)
            sizes = {path.name: path.stat().st_size for path in part.iterdir()}
            (part / _WHOLE).write_text(json.dumps(sizes), encoding="utf-8")
            if folder.exists() and _find_fault(folder) is not None:  # marked while it was removed
                shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        if _find_fault(folder) is not None:
            raise


def _is_dead(part: Path, key: str) -> bool:
    """Return whether the writer of a partial folder certainly has ended.

    That is so if it was a process of this machine, or if nothing was written for days.
    """
    machine, _, process = part.name.removeprefix(f"{key}.").partition(".")
    process = process.partition(".")[0]
    if machine == machine_name() and process.isdecimal():
        return not is_running(int(process))
    try:
        newest = max(path.stat().st_mtime for path in (part, *part.iterdir()))
    except OSError:  # another writer is removing or renaming it
        return False
    return time.time() - newest > _OLD


def _find_fault(folder: Path) -> str | None:
    """Return why a table is not complete, or None; a cleaned or truncated cache is rewritten."""
    if not folder.is_dir():
        return _MISSING
    try:
        sizes = json.loads((folder / _WHOLE).read_text(encoding="utf-8"))
        if _DAMAGED in sizes:
            return str(sizes[_DAMAGED])
        for name, size in sizes.items():
            if (folder / name).stat().st_size != size:
                return f"{name} is not as long as it was when written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, AttributeError, TypeError):
        return f"{_WHOLE} is damaged"
    return None


def hash_rows(rows: datasets.Dataset) -> str:
    """Hash names, types and values; equal for any file, path or chunks they came in."""
    digest = xxhash.xxh3_128(repr(sorted(rows.features.items())).encode())
    columns, tables = sorted(rows.column_names), rows.with_format("arrow")
    for batch in split_rows(row_sizes(rows), most_bytes=_HASHED_BYTES, most_rows=_HASHED_ROWS):
        table = cast(pa.Table, tables[batch.start : batch.stop])  # a slice; nothing is copied
        # Copied, because a slice of a longer column is serialised with other offsets.
        copies = [pa.concat_arrays(table.column(name).chunks) for name in columns]
        digest.update(pa.record_batch(copies, names=columns).serialize())
    return digest.hexdigest()


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash what decides the output; a hash by pickling changes once it has been used."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    if backend is not None:
        state.pop("truncation", None)
        state.pop("padding", None)
    kind = type(tokenizer)
    templates = [tokenizer.chat_template, tokenizer.special_tokens_map]
    decisive = [kind.__module__, kind.__qualname__, state, *templates]
    return xxhash.xxh3_128(json.dumps(decisive, default=str).encode()).hexdigest()
