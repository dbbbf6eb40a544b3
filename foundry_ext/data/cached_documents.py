"""Tables of documents in the cache: Arrow files, and about.json with checksums beside them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets

from foundry_ext.data.cache import DamagedTableError, find_cached, read_cached
from foundry_ext.data.documents import Documents, Stored

_ABOUT = "about.json"


def cached_documents(key: str, write: Callable[[Path], object]) -> Documents:
    """Return the documents of a key; if they are missing or damaged, `write` makes them.

    Args:
        key: the key in the cache.
        write: makes the table, in .arrow files of the folder that it is given.

    Raises:
        UserError: the table is damaged, in a folder that cannot be changed.
    """

    def fill(folder: Path) -> None:
        write(folder)
        files = sorted(path.name for path in folder.glob("*.arrow"))
        documents = Documents(_read_table(folder, files))
        about = {"files": files, "fingerprint": documents.fingerprint}
        text = json.dumps({**about, "checksums": documents.checksums()})
        (folder / _ABOUT).write_text(text, encoding="utf-8")

    return read_cached(key, fill, _read)


def find_documents(key: str) -> Documents | None:
    """Return the documents of a key, or None if they are missing or damaged."""
    return find_cached(key, _read)


def _read(folder: Path) -> Documents:
    """Return the documents that were stored in the folder.

    Raises:
        DamagedTableError: it holds something else.
    """
    about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
    if "checksums" not in about:
        raise DamagedTableError("an earlier version wrote it, without checksums")
    table = _read_table(folder, about["files"])
    known = {name: about[name] for name in ("fingerprint", "checksums")}
    return Documents(table, stored=Stored(folder=folder, **known))


def _read_table(folder: Path, files: Sequence[str]) -> datasets.Dataset:
    return datasets.concatenate_datasets(
        [datasets.Dataset.from_file(str(folder / file)) for file in files]
    )
