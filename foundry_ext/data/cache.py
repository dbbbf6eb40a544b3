"""Cache of tokenised rows on disk, keyed by everything that decides the tokens.

<cache folder of `datasets`>/foundry_ext/<key>/   the table's Arrow files and whole.json

The key is a hash of content: the same rows in another file, or in a touched one, are found again.
A folder is renamed to its key after all of it is on the disk, so a killed writer leaves nothing
that looks like a table; the next writer removes its leftovers.
"""

import importlib.metadata
import inspect
import json
import logging
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import datasets.config
import filelock
import pyarrow as pa
import xxhash
from datasets.fingerprint import Hasher
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from foundry_ext.utils.atomic import replaced_folder

log = logging.getLogger(__name__)

_FORMAT_VERSION = 2  # of the table and of the key
_DECIDING_PACKAGES = ("llm-foundry", "tokenizers", "transformers")
_WHOLE = "whole.json"
# Rows per hashed batch. Measured: 5 GB/s with 1,000 to 10,000 short rows, 1 GB/s with 100,000,
# which no longer fit the CPU's caches.
_HASHED_ROWS = 1000


def table_key(
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    settings: dict[str, Any],
    preprocess: Callable[..., Any] | None,
) -> str:
    """Return a hash of rows, tokenizer, settings, preprocessing's source file and versions."""
    versions = [_FORMAT_VERSION, *map(importlib.metadata.version, _DECIDING_PACKAGES)]
    formatting = [preprocess, _source_code(preprocess)]
    return Hasher.hash(
        [_hash_rows(rows), _hash_tokenizer(tokenizer), settings, formatting, versions]
    )


def cached(key: str, write: Callable[[Path], None]) -> Path:
    """Return the folder of a key; if it is missing, `write` fills it first, in one process.

    Others that need the same table wait for it, on all ranks and in all runs of a machine.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE, "foundry_ext", key)
    if _is_complete(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_suffix(".lock")):
        if not _is_complete(folder):
            _fill(folder, write)
    return folder


def _locked(path: Path) -> filelock.BaseFileLock:
    lock = filelock.FileLock(path)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        log.warning("another process is tokenizing the same rows; waiting for it (%s)", path)
    else:
        lock.release()
    return lock


def _fill(folder: Path, write: Callable[[Path], None]) -> None:
    """Fill the folder, under the lock; leftovers of other writers of this key are dead."""
    for leftover in (folder, *folder.parent.glob(f"{folder.name}.*.part")):
        shutil.rmtree(leftover, ignore_errors=True)
    part = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.part")
    with replaced_folder(folder, partial=part):
        write(part)
        sizes = {path.name: path.stat().st_size for path in part.iterdir()}
        (part / _WHOLE).write_text(json.dumps(sizes), encoding="utf-8")


def _is_complete(folder: Path) -> bool:
    """Return whether all files have their size; a cleaned or truncated cache is rewritten."""
    try:
        sizes = json.loads((folder / _WHOLE).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (FileNotFoundError, NotADirectoryError):
        return False


def _hash_rows(rows: datasets.Dataset) -> str:
    """Hash names, types and values; equal for any file, path or chunks they came in."""
    digest = xxhash.xxh3_128(repr(sorted(rows.features.items())).encode())
    columns = sorted(rows.column_names)
    for table in rows.with_format("arrow").iter(_HASHED_ROWS):  # slices; nothing is copied
        # Copied, because a slice of a longer column is serialised with other offsets.
        copies = [pa.concat_arrays(cast(pa.Table, table).column(name).chunks) for name in columns]
        digest.update(pa.record_batch(copies, names=columns).serialize())
    return digest.hexdigest()


def _hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
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


def _source_code(function: Callable[..., Any] | None) -> bytes | None:
    """Return the source of a function's module, because pickling keeps only the function's name.

    So a change to a helper in the same file invalidates the cache too.
    """
    path = getattr(inspect.getmodule(function), "__file__", None)
    return None if path is None else Path(path).read_bytes()
