"""Files that a source names: one file, a folder, or patterns; what they are, and which are read.

Of a folder, all files of one kind and of the split asked for are read, in sorted order. The split
is a part of the file's name, or of a folder's above it, by the conventions of `datasets`:
`train-1.jsonl`, `my_val.csv`, `test/a.parquet`. A file that names none is of the split train.
"""

import glob
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from composer.utils import dist

from foundry_ext.data.opening import COMPRESSED
from foundry_ext.utils.errors import UserError, shortened

log = logging.getLogger(__name__)

KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""Kinds of rows by suffix, of those that messages name."""
_KINDS = {**KINDS, ".ndjson": "json", ".tsv": "csv", ".arrow": "arrow", ".txt": "text"}
_PACKED = (".zst", ".zip", ".lz4", ".7z", ".rar", ".tar", ".tgz", ".br", ".z")
_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLITS = {keyword: split for split, keywords in _KEYWORDS.items() for keyword in keywords}
_SEPARATORS = re.compile(r"[-._ 0-9]+")
# As `datasets` writes its own: the name before the numbers is the split, whatever it is.
_SHARD = re.compile(r"(?:.*/)?data/(.+)-\d{5}-of-\d{5}[^/]*")
_NOT_ROWS = {
    *("README.md", "config.json", "dataset_info.json", "dataset_infos.json", "state.json"),
    *("dataset_dict.json", "dummy_data.zip"),
}
_BACKUPS = (".bak", ".tmp", ".orig", ".old", ".swp", ".partial", ".part", "~")
# What `map` and its kin leave in a folder of `save_to_disk`: results, and those cut while written.
_RESULTS = re.compile(r"cache-.*\.arrow|tmp[a-z0-9_]{8}")


def is_file_name(name: str) -> bool:
    """Return whether a name ends as a file of rows does, compressed or not."""
    return suffixes(name)[0] in KINDS or suffixes(name)[0] in (".ndjson", ".tsv")


def kind_of(path: Path) -> str:
    """Return the reader of a file by its suffix: json, csv, parquet, arrow or text.

    Raises:
        UserError: it has no such suffix, or is packed in a way that is not read.
    """
    suffix, packing = suffixes(path.name)
    if not suffix:
        raise UserError(
            f"{path}: its name does not end as a file of rows; name the reader, such as"
            " hf_name: json"
        )
    if packing in _PACKED or (packing and _KINDS[suffix] in ("parquet", "arrow")):
        raise UserError(
            f"{path}: {packing} is not read; unpack it, or compress it as"
            f" {path.name.removesuffix(path.suffix)}.gz"
        )
    return _KINDS[suffix]


def suffixes(name: str) -> tuple[str, str]:
    """Return (".jsonl", ".gz") for rows.jsonl.gz; each is "" if it is no kind of rows or packing.

    The readers go by nothing else of a name.
    """
    path = PurePosixPath(name.lower())
    packing = path.suffix if path.suffix in (*COMPRESSED, *_PACKED) else ""
    suffix = PurePosixPath(path.stem).suffix if packing else path.suffix
    return suffix if suffix in _KINDS else "", packing


def files_of_folder(folder: Path, *, any_name: bool = False) -> dict[str, list[Path]]:
    """Return the files of each split of a folder and of those below it, sorted.

    `any_name` takes files whose suffix tells no kind, too. What is left out is logged.

    Raises:
        UserError: it is a folder of MDS shards, or a file's name stands for two splits.
    """
    _refuse_mds(folder)
    found = sorted(path.relative_to(folder).as_posix() for path in _walk(folder))
    found = [name for name in found if _may_be_rows(name)]
    saved = _saved(folder / name for name in found)
    names = [name for name in found if not _is_backup(name) and (any_name or suffixes(name)[0])]
    names = [name for name in names if _is_of(saved, folder / name)]
    if not any_name:  # notes and licences beside rows
        names = [name for name in names if suffixes(name)[0] != ".txt"] or names
    shards = {name: match[1] for name in names if (match := _SHARD.fullmatch(name))}
    splits: dict[str, list[Path]] = {}
    for name in shards or names:
        splits.setdefault(shards.get(name) or _split_of(folder, name), []).append(folder / name)
    ignored = [name for name in found if name not in (shards or names)]
    if ignored and splits and dist.get_global_rank() == 0:
        log.warning("%s: not read as rows: %s", folder, _names(ignored))
    root = folder.resolve()
    for split, files in splits.items():
        # A file itself is kept rather than a link to it.
        links = {path for path in files if path.resolve() != root / path.relative_to(folder)}
        files.sort(key=lambda path: (path in links, path))
        splits[split] = sorted(_distinct(files))
    return splits


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder and of those below it, without hidden ones.

    Links to folders are followed, except to a folder that holds the link.
    """
    for at, folders, files in os.walk(folder, followlinks=True):
        above = [path.resolve() for path in (Path(at), *Path(at).parents)]
        inside = [Path(at, name) for name in sorted(folders) if not name.startswith(".")]
        loops = [path for path in inside if path.is_symlink() and path.resolve() in above]
        _log_copies(loops)
        folders[:] = [path.name for path in inside if path not in loops]
        shown = (Path(at, name) for name in files if not name.startswith("."))
        yield from (path for path in shown if path.is_file())


def _distinct(files: Iterable[Path]) -> list[Path]:
    """Return the files without those that are there already by another name, which are logged."""
    first: dict[Path, Path] = {}
    _log_copies([path for path in files if first.setdefault(path.resolve(), path) is not path])
    return list(first.values())


def _log_copies(paths: Sequence[Path]) -> None:
    if paths and dist.get_global_rank() == 0:
        names = _names(map(str, paths))
        log.warning("not read again, as it is named twice or is a link: %s", names)


def _is_of(saved: Mapping[Path, set[str]], path: Path) -> bool:
    return path.parent not in saved or path.name in saved[path.parent]


def _may_be_rows(name: str) -> bool:
    path = PurePosixPath(name)
    return path.name not in _NOT_ROWS and "__pycache__" not in path.parts


def _is_backup(name: str) -> bool:
    name = PurePosixPath(name).name
    return bool(_RESULTS.fullmatch(name)) or name.lower().endswith((*_BACKUPS, ".source.json"))


def _saved(files: Iterable[Path]) -> dict[Path, set[str]]:
    """Return the names of the rows' files in the folders that `save_to_disk` wrote.

    Raises:
        UserError: one of them is not there.
    """
    saved: dict[Path, set[str]] = {}
    for folder in sorted({file.parent for file in files}):
        try:
            parts = json.loads((folder / "state.json").read_bytes())["_data_files"]
            saved[folder] = {part["filename"] for part in parts}
        except (ValueError, TypeError, KeyError, OSError):
            continue
        for name in sorted(saved[folder]):
            if not (folder / name).is_file():
                raise UserError(
                    f"{folder / 'state.json'} names {name}, which is not there; copy the whole"
                    " folder"
                )
    return saved


def _split_of(folder: Path, name: str) -> str:
    path = PurePosixPath(name.lower())
    for part in (path.name, *(parent.name for parent in path.parents)):
        found = {_SPLITS[word] for word in _SEPARATORS.split(part) if word in _SPLITS}
        if len(found) > 1:
            raise UserError(
                f"{folder / name}: its name stands for {' and '.join(sorted(found))}; rename it, or"
                " name the files of each split in hf_kwargs.data_files"
            )
        if found:
            return found.pop()
    return "train"


def _refuse_mds(folder: Path) -> None:
    for index in sorted({*folder.glob("index.json"), *folder.glob("*/index.json")}):
        try:
            is_mds = "shards" in json.loads(index.read_bytes())
        except (ValueError, TypeError, OSError):
            continue
        if is_mds:
            local = f"local: {folder}"
            if index.parent != folder:
                local += f", split: {index.parent.name}"
            raise UserError(
                f"hf_name: {folder} is a folder of MDS shards; leave hf_name out and set {local}"
            )


def select_split(
    splits: Mapping[str, Sequence[Path]], split: str, source: str, *, named: bool = False
) -> list[Path]:
    """Return the files of a split, and log which they are.

    `named` files, those of `hf_kwargs.data_files`, may have any suffixes that one reader reads. A
    folder's .json beside .jsonl is refused, because it may describe them.

    Raises:
        UserError: the split has no files, or files of several kinds.
    """
    wanted = split if split in splits else _SPLITS.get(split.lower(), split)
    files = list(splits.get(wanted, ()))
    if not files:
        found = "; ".join(f"{name}: {_names(some)}" for name, some in sorted(splits.items()))
        raise UserError(f"split {split!r} has no files in {source}; there are {found}")
    kinds = {
        _kind_among(path, named): path
        for path in reversed(files)
        if suffixes(path.name)[0] or not named
    }
    if len(kinds) > 1:
        names = _names(sorted(kinds.values()))
        raise UserError(
            f"{source}: files of several kinds for split {split}, {names}; keep one kind, or name"
            " the files in hf_kwargs.data_files"
        )
    _refuse_copies(files, source)
    others = [path for name, some in splits.items() if name != wanted for path in some]
    rest = f"; other splits: {_names(others)}" if others else ""
    log.info("%s, split %s: reads %s%s", source, split, _names(files), rest)
    return files


def _kind_among(path: Path, named: bool) -> str:
    suffix = suffixes(path.name)[0]
    return suffix if suffix == ".json" and not named else _KINDS.get(suffix, "")


def _refuse_copies(files: Sequence[Path], source: str) -> None:
    plain = {path.with_suffix("") if suffixes(path.name)[1] else path: path for path in files}
    if len(plain) < len(files):
        twice = next(path for path in files if path not in plain.values())
        raise UserError(f"{source}: {twice.name} is there compressed and plain; remove one of both")


def files_of_patterns(patterns: Any, base: Path) -> dict[str, list[Path]]:
    """Return the files of each split that `hf_kwargs.data_files` names.

    `patterns` is a name or pattern of the split train, a list of them, or {split: names}.

    Raises:
        UserError: a name is a folder's, or is no text.
        FileNotFoundError: a name or pattern has no files.
    """
    if not isinstance(patterns, Mapping):
        patterns = {"train": patterns}
    splits: dict[str, list[Path]] = {}
    for split, names in patterns.items():
        listed = [names] if isinstance(names, str) else names
        if not isinstance(listed, Sequence) or not all(isinstance(name, str) for name in listed):
            raise UserError(
                f"hf_kwargs.data_files: {shortened(names)}; give names or patterns of files, as a"
                " text, a list or {split: names}"
            )
        for name in listed:
            exact = (base / name).is_file()
            found = [base / name] if exact else sorted(_glob(name, base))
            if not found and (base / name).is_dir():
                raise UserError(
                    f"hf_kwargs.data_files: {base / name} is a folder; name its files, such as"
                    f" {Path(name, '*')}, or give the folder as hf_kwargs.data_dir"
                )
            if not found:
                raise FileNotFoundError(f"data_files: {name} has no files (in {base.absolute()})")
            splits.setdefault(str(split), []).extend(found)
    return {split: _distinct(files) for split, files in splits.items()}


def _glob(pattern: str, base: Path) -> Iterable[Path]:
    names = glob.glob(pattern, root_dir=base, recursive=True)
    return (base / name for name in names if (base / name).is_file() and not _is_backup(name))


def _names(paths: Iterable[Path | str]) -> str:
    names = [path.name if isinstance(path, Path) else path for path in paths]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
