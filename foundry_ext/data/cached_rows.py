"""Rows of files in the cache: one Arrow file, and its digest beside it."""

from collections.abc import Callable
from pathlib import Path

import datasets

from foundry_ext.data.cache import DamagedTableError, read_cached
from foundry_ext.data.content import read_digest

_ROWS, _DIGEST = "rows.arrow", "rows.digest"


def cached_rows(key: str, write: Callable[[Path], None]) -> datasets.Dataset:
    """Return the rows of a key; if they are missing or damaged, `write` makes them.

    Args:
        key: the key in the cache.
        write: writes the rows to the path that it is given, as an Arrow stream.

    Raises:
        UserError: the rows are damaged, in a folder that cannot be changed.
    """

    def fill(folder: Path) -> None:
        write(folder / _ROWS)
        (folder / _DIGEST).write_text(read_digest(folder / _ROWS), encoding="utf-8")

    return read_cached(key, fill, _read)


def _read(folder: Path) -> datasets.Dataset:
    if not (folder / _DIGEST).exists():
        raise DamagedTableError("an earlier version wrote it, without a digest")
    if read_digest(folder / _ROWS) != (folder / _DIGEST).read_text(encoding="utf-8"):
        raise DamagedTableError(f"the bytes of {_ROWS} are not those that were written")
    return datasets.Dataset.from_file(str(folder / _ROWS))
