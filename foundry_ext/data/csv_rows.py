"""Rows of CSV files: every cell is text, as the file writes it."""

import csv
import io
import sys
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from foundry_ext.data.files import suffixes
from foundry_ext.data.opening import decoding_fault, open_binary, text_encoding
from foundry_ext.data.row_errors import separator_hint
from foundry_ext.data.rows import Row
from foundry_ext.utils.errors import UserError

DIALECT = ("quotechar", "quoting", "escapechar", "doublequote", "skipinitialspace")


def read_csv(
    path: Path,
    *,
    sep: str | None = None,
    names: Sequence[str] | None = None,
    header: Any = "infer",
    skiprows: int = 0,
    encoding: str | None = None,
    **dialect: Any,
) -> Iterator[Row]:
    """Yield the rows of a file.

    007, 2021-05-03, NA and null stay what they are, and an empty cell is an empty text. A cell that
    a short line lacks is null.

    Args:
        path: the file, compressed or not.
        sep: separates cells; a comma by default, a tab in a .tsv.
        names: names of the columns. The file then has no line of names, unless `header` is 0.
        header: 0 for a first line of names, which is there by default if `names` is not.
        skiprows: lines before the first.
        encoding: UTF-8 by default, with or without a byte order mark.
        dialect: keys of `DIALECT`, as in Python's csv.

    Raises:
        UserError: a line has more cells than there are columns, is not CSV, or is not in the
            encoding; names the line. Or Python does not know the encoding.
    """
    encoding = text_encoding(path, encoding)
    csv.field_size_limit(sys.maxsize)  # a cell may be a book
    sep = sep or ("\t" if suffixes(path.name)[0] == ".tsv" else ",")
    has_names = header == 0 or names is None
    if header not in ("infer", 0):
        raise UserError(
            f"{path}: hf_kwargs.header: {header!r}; give 0 for a first line of names, or the names"
            " themselves as hf_kwargs.column_names"
        )
    with open_binary(path) as file:
        text = io.TextIOWrapper(file, encoding, newline="")
        try:
            for _ in range(skiprows):
                next(text, None)
            lines = csv.reader(text, delimiter=sep, strict=True, **dialect)
            yield from _read(path, lines, names, skiprows, has_names=has_names)
        except UnicodeDecodeError as error:
            raise decoding_fault(path, encoding, error) from error
        except TypeError as error:  # of the dialect
            raise UserError(f"{path}: hf_kwargs: {error}") from error


def _read(
    path: Path, lines: Any, names: Sequence[str] | None, skipped: int, *, has_names: bool
) -> Iterator[Row]:
    def place() -> str:
        return f"{path}, line {lines.line_num + skipped}"

    try:
        if has_names:
            first = next((cells for cells in lines if cells), None)
            if first is None:
                raise UserError(f"{path} is empty; write rows to it, or name another")
            names = names or _distinct(first)
        assert names is not None
        for cells in lines:
            if not cells:  # a blank line
                continue
            if len(cells) > len(names):
                hint = separator_hint(names) or (
                    '; put a cell that contains the separator in quotes, "..."'
                )
                fault = f"{len(cells)} cells, but {len(names)} column{'s' * (len(names) > 1)}"
                raise UserError(f"{place()}: {fault}{hint}")
            values: dict[str, Any] = dict(zip_longest(names, cells))
            yield Row(place(), values, sum(map(len, cells)))
    except csv.Error as error:
        raise UserError(
            f'{place()}: not CSV ({error}); a quote inside a quoted cell is written twice, ""'
        ) from error


def _distinct(names: Sequence[str]) -> list[str]:
    """Return the names as pandas changes them: a, a becomes a, a.1, and one without a name ..."""
    found: list[str] = []
    for position, name in enumerate(names):
        name = name or f"Unnamed: {position}"
        number, candidate = 0, name
        while candidate in found:
            number += 1
            candidate = f"{name}.{number}"
        found.append(candidate)
    return found
