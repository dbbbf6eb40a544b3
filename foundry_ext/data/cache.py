"""Tokenised rows on disk, under a key of all that decides them and nothing else.

<cache folder of `datasets`>/foundry_ext/<key>/   the table's Arrow files and whole.json

Content makes the key: the same rows in another file, or in one that was touched, are found again.
A folder appears under its key by one rename, after all of it is on the disk, so a writer that is
killed leaves nothing that is taken for a table; the next one removes what it did leave.
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
# Hashed at a time. Measured: 5 GB/s with 1,000 to 10,000 short rows, 1 with 100,000, which leave
# the CPU's caches.
_HASHED_ROWS = 1000


def table_key(
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    settings: dict[str, Any],
    preprocess: Callable[..., Any] | None,
) -> str:
    """Of rows, tokenizer, settings, preprocessing with the file it stands in, and versions."""
    versions = [_FORMAT_VERSION, *map(importlib.metadata.version, _DECIDING_PACKAGES)]
    formatting = [preprocess, _source_code(preprocess)]
    return Hasher.hash([_of_rows(rows), _of_tokenizer(tokenizer), settings, formatting, versions])


def cached(key: str, write: Callable[[Path], None]) -> Path:
    """The folder of a key; where there is none, `write` fills it first, in one process only.

    Others that want the same table meanwhile wait for it, on all ranks and in all runs of a
    machine.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE, "foundry_ext", key)
    if _is_whole(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_suffix(".lock")):
        if not _is_whole(folder):
            _fill(folder, write)
    return folder


def _locked(path: Path) -> filelock.BaseFileLock:
    lock = filelock.FileLock(path)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        log.warning("another process is tokenizing the same rows: waiting for it (%s)", path)
    else:
        lock.release()
    return lock


def _fill(folder: Path, write: Callable[[Path], None]) -> None:
    """Under the lock: what other writers of this key left behind is dead."""
    for left in (folder, *folder.parent.glob(f"{folder.name}.*.part")):
        shutil.rmtree(left, ignore_errors=True)
    part = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.part")
    with replaced_folder(folder, partial=part):
        write(part)
        sizes = {path.name: path.stat().st_size for path in part.iterdir()}
        (part / _WHOLE).write_text(json.dumps(sizes))


def _is_whole(folder: Path) -> bool:
    """Whether all files are there, as long as they were: a cleaned or cut cache is made anew."""
    try:
        sizes = json.loads((folder / _WHOLE).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (FileNotFoundError, NotADirectoryError):
        return False


def _of_rows(rows: datasets.Dataset) -> str:
    """Hash of names, types and values; the same for any file, path or chunks that they came in."""
    digest = xxhash.xxh3_128(repr(sorted(rows.features.items())).encode())
    columns = sorted(rows.column_names)
    for table in rows.with_format("arrow").iter(_HASHED_ROWS):  # slices, nothing is copied
        # Copied, as a slice of a longer column is written with other offsets.
        copies = [pa.concat_arrays(cast(pa.Table, table).column(name).chunks) for name in columns]
        digest.update(pa.record_batch(copies, names=columns).serialize())
    return digest.hexdigest()


def _of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """What of a tokenizer decides its output; its hash by pickling changes once it was used."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    if backend is not None:
        state.pop("truncation", None)
        state.pop("padding", None)
    kind = type(tokenizer)
    decisive = [
        kind.__module__,
        kind.__qualname__,
        state,
        tokenizer.chat_template,
        tokenizer.special_tokens_map,
    ]
    return xxhash.xxh3_128(json.dumps(decisive, default=str).encode()).hexdigest()


def _source_code(function: Callable[..., Any] | None) -> bytes | None:
    """The text of a function's module: pickling an importable function keeps no more than its name.

    So the cache is left behind too when a helper in the same file has changed.
    """
    path = getattr(inspect.getmodule(function), "__file__", None)
    return None if path is None else Path(path).read_bytes()
