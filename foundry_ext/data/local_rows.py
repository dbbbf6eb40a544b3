"""Rows of local files, cached as Arrow by the files' content.

<cache folder of `datasets`>/foundry_ext/rows-<key>/   rows.arrow and its digest

`datasets` has a cache of its own, keyed by a file's path and mtime, so it would return old rows of
a changed file whose time was put back.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import datasets.config
from datasets.fingerprint import Hasher

from foundry_ext.data.cached_rows import cached_rows
from foundry_ext.data.columnar import write_tables
from foundry_ext.data.content import content_digest
from foundry_ext.data.csv_rows import DIALECT, read_csv
from foundry_ext.data.files import (
    files_of_folder,
    files_of_patterns,
    is_file_name,
    kind_of,
    select_split,
    suffixes,
)
from foundry_ext.data.json_lines import read_json
from foundry_ext.data.rows import Row, write_rows
from foundry_ext.data.text_lines import read_text
from foundry_ext.utils.errors import UserError, one_line

_FORMAT_VERSION = 2  # of the readers
_BUILDERS = ("json", "csv", "parquet", "arrow", "text")
# Of load_dataset, about downloads and its cache, of which there are none here.
_WITHOUT_EFFECT = {
    *("cache_dir", "download_config", "download_mode", "keep_in_memory", "num_proc", "revision"),
    *("name", "save_infos", "storage_options", "token", "trust_remote_code", "verification_mode"),
    *("chunksize", "batch_size", "keep_default_na", "na_filter"),
}
_OPTIONS = {
    "json": {"field", "encoding"},
    "csv": {
        "sep",
        "delimiter",
        "names",
        "column_names",
        "header",
        "skiprows",
        "encoding",
        *DIALECT,
    },
    "parquet": {"columns"},
    "text": {"encoding", "keep_linebreaks", "sample_by"},
    "arrow": set(),
}


def load_files(hf_name: str, split: str, hf_kwargs: Mapping[str, Any]) -> datasets.Dataset | None:
    """Return the rows of local files, or None if `hf_name` is for `datasets`: a hub name or such.

    Args:
        hf_name: file, folder, or builder ("json", with `data_files` in `hf_kwargs`).
        split: as in `datasets.load_dataset`, slices included ("train[:1%]").
        hf_kwargs: `data_files`, `data_dir`, and what the kind's reader takes, see `_OPTIONS`.

    Raises:
        UserError: unknown keys, no such split, or a file that cannot be read as rows.
        FileNotFoundError: no such file.
    """
    with _naming_split(split, hf_name):
        instruction = datasets.ReadInstruction.from_spec(split.strip())
    options = dict(hf_kwargs)
    found = _find(hf_name, options)
    if found is None:
        return None
    if options.pop("streaming", False):
        raise UserError(
            f"dataset {hf_name}: streaming is not possible: packing needs every document's length"
        )
    kind, splits = found
    if split == "all" and splits is not None:
        split = "+".join(splits)
        instruction = datasets.ReadInstruction.from_spec(split)
    names = [part.split("[")[0].strip() for part in split.split("+")]
    if splits is None and len(set(names)) > 1:
        raise UserError(f"split {split!r}: {hf_name} is one file, and so one split")
    files = {
        name: [Path(hf_name)]
        if splits is None
        else select_split(splits, name, hf_name, named=bool(hf_kwargs.get("data_files")))
        for name in names
    }
    tables = _read_alike(files, kind, options)
    with _naming_split(split, hf_name):
        parts = instruction.to_absolute({name: len(rows) for name, rows in tables.items()})
        rows = [_slice(tables[part.splitname], part.from_, part.to) for part in parts]
    return _concatenate(rows, split, hf_name)


def files_of_split(
    hf_name: str, split: str, hf_kwargs: Mapping[str, Any]
) -> tuple[list[Path], dict[str, Any]] | None:
    """Return the local files of one whole split, and the other options of `hf_kwargs`.

    None stands for anything else that `load_files` or `datasets` reads: a part of a split, several
    splits, or rows that are not in local files.

    Raises:
        UserError: no such split, or files that cannot be read as rows.
        FileNotFoundError: no such file.
    """
    options = dict(hf_kwargs)
    found = _find(hf_name, options)
    if found is None or split == "all" or not split.replace("_", "").isalnum():
        return None
    kind, splits = found
    if splits is None:
        return [Path(hf_name)], options
    named = bool(hf_kwargs.get("data_files"))
    return (select_split(splits, split, hf_name, named=named), options) if kind is None else None


@contextlib.contextmanager
def _naming_split(split: str, hf_name: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, AssertionError, IndexError) as error:
        raise UserError(
            f"split {split!r} of {hf_name}: {one_line(error)}; write a name of letters, digits, _"
            " and ., and after it, if not all rows are to be read, a slice such as train[:90%]"
        ) from error


def _read_alike(
    files: Mapping[str, Sequence[Path]], kind: str | None, options: dict[str, Any]
) -> dict[str, datasets.Dataset]:
    """Return the rows of each split, of the same types in all if one reader reads them all."""
    kinds = {name: kind or kind_of(paths[0]) for name, paths in files.items()}
    tables = {name: _read(paths, kinds[name], options) for name, paths in files.items()}
    (one, *more), features = set(kinds.values()), [rows.features for rows in tables.values()]
    if more or all(other == features[0] for other in features):
        return tables
    # The types are learned over all files at once, whose rows come in the files' order.
    together = _read([path for paths in files.values() for path in paths], one, options)
    start = 0
    for name, rows in tables.items():
        tables[name] = _slice(together, start, start + len(rows))
        start += len(rows)
    return tables


def _concatenate(rows: list[datasets.Dataset], split: str, hf_name: str) -> datasets.Dataset:
    if len(rows) == 1:
        return rows[0]
    try:
        return datasets.concatenate_datasets(rows)
    except ValueError as error:  # its message names the column
        raise UserError(
            f"split {split!r} of {hf_name}: {one_line(error)}; write the column as one type in all"
            " files, or name the splits as two sources"
        ) from error


def _find(
    hf_name: str, options: dict[str, Any]
) -> tuple[str | None, dict[str, list[Path]] | None] | None:
    """Return (kind, files of each split), taking their keys out of `options`.

    The kind is None if the files' suffixes tell it, and the splits are None for a single file.
    """
    path = Path(hf_name)
    patterns, folder = options.get("data_files"), options.get("data_dir")
    if is_file_name(hf_name) and "://" not in hf_name and not path.is_dir():
        _check_file(path)
        options.pop("data_files", None)
        return None, None
    is_builder = hf_name in _BUILDERS
    if not is_builder and (not path.is_dir() or _is_for_datasets(path)):
        return None
    if "://" in str(patterns) or (is_builder and not (patterns or folder)):
        return None
    for key in ("data_files", "data_dir"):
        options.pop(key, None)
    base = Path(*([] if is_builder else [path]), *([folder] if folder else []))
    if folder and "://" not in str(folder):
        _check_folder(base)
    splits = (
        files_of_patterns(patterns, base)
        if patterns
        else files_of_folder(base, any_name=is_builder)
    )
    return ((hf_name if is_builder else None), splits) if splits else None


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"dataset file {path} does not exist (in {Path.cwd()})")
    if path.stat().st_size == 0:
        raise UserError(f"dataset file {path} is empty; write rows to it, or name another")


def _check_folder(path: Path) -> None:
    if path.is_file():
        raise UserError(
            f"hf_kwargs.data_dir: {path} is a file; give its folder, or name the file as"
            " hf_kwargs.data_files"
        )
    if not path.is_dir():
        raise FileNotFoundError(f"hf_kwargs.data_dir: {path} does not exist (in {Path.cwd()})")


def _is_for_datasets(folder: Path) -> bool:
    """Return whether a folder has a loading script, or configurations, which `datasets` knows."""
    if (folder / f"{folder.name}.py").is_file():
        return True
    card = folder / "README.md"
    return card.is_file() and b"\nconfigs:" in card.read_bytes().partition(b"\n---\n")[0]


def _slice(rows: datasets.Dataset, start: int, end: int) -> datasets.Dataset:
    if (start, end) == (0, len(rows)):
        return rows
    return rows.select(range(start, end) if start < end else [])


def _read(files: Sequence[Path], kind: str, options: dict[str, Any]) -> datasets.Dataset:
    options = {key: value for key, value in options.items() if key not in _WITHOUT_EFFECT}
    unknown = sorted(options.keys() - _OPTIONS[kind])
    if unknown:
        raise UserError(
            f"hf_kwargs.{unknown[0]} is not read for {files[0]}; the keys for {kind} files are"
            f" data_files, data_dir, {', '.join(sorted(_OPTIONS[kind]))}"
        )
    if kind == "text" and not any(path.stat().st_size for path in files):
        raise UserError(f"dataset file {files[0]} is empty; write text to it, or name another")
    digest = content_digest(files)
    forms = [suffixes(path.name) for path in files]
    key = Hasher.hash([_FORMAT_VERSION, kind, sorted(options.items()), forms, digest])

    def check_unchanged() -> None:
        if content_digest(files) != digest:
            names = ", ".join(map(str, files[:3]))
            raise UserError(f"{names} changed while it was read; start again")

    def write(path: Path) -> None:
        try:
            if kind in ("parquet", "arrow"):
                write_tables(path, files, kind, **options)
            else:
                write_rows(path, _reader(files, kind, options))
        except Exception:
            check_unchanged()  # a change may be the cause, and then it is what to say
            raise
        check_unchanged()

    return cached_rows(f"rows-{key}", write)


def _reader(
    files: Sequence[Path], kind: str, options: Mapping[str, Any]
) -> Callable[[], Iterator[Row]]:
    """Return a function that reads the files' rows, one file after the other."""
    same = {"delimiter": "sep", "column_names": "names"}  # `datasets` has two names for some
    arguments = {same.get(key, key): value for key, value in options.items() if value is not None}
    readers = {"json": read_json, "csv": read_csv, "text": read_text}
    read: Callable[..., Iterator[Row]] = readers[kind]
    return lambda: itertools.chain.from_iterable(read(path, **arguments) for path in files)


def cache_of_folder(folder: Path) -> str:
    """Return a cache folder for what `datasets` makes of a folder, named by its files' content."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in files]
    key = Hasher.hash([names, content_digest(files)])
    return str(Path(datasets.config.HF_DATASETS_CACHE, "foundry_ext", f"datasets-{key}"))
