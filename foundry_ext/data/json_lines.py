"""Faults of a file of JSON rows, by line number.

pyarrow, which reads the rows, counts them from the start of a block, and reads some files as rows
without values, or dies of them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foundry_ext.utils.errors import UserError

_EXAMPLE = '{"prompt": "...", "response": "..."}'
_KINDS = {str: "text", bool: "true or false", dict: "an object", list: "a list"}


def check_lines(path: Path) -> None:
    """Check that the rows are objects.

    pyarrow 19 reads most others as rows without values, and ends the process without a message
    (SIGSEGV) if one of its blocks begins with `null`.

    Raises:
        UserError: a line is not UTF-8 or begins no object, or there are no rows.
    """
    only_null = path.suffix != ".jsonl"  # an object of a .json may span many lines
    has_rows = False
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            _decode(path, line, number)
            start = line.lstrip()[:4]
            if start[:1] in (b"", b"{") or (only_null and start != b"null"):
                if start[:1] == b"[":  # one array of all rows
                    return
                has_rows = has_rows or start != b""
                continue
            raise UserError(
                f"{path}, line {number}: {line[:40]!r} does not begin a JSON object; write one row"
                f" per line, in UTF-8, such as {_EXAMPLE}"
            )
    if not has_rows:
        raise UserError(f"{path} is empty; write one row per line, such as {_EXAMPLE}")


def _decode(path: Path, line: bytes, number: int) -> None:
    try:
        line.decode()
    except UnicodeDecodeError as error:
        position, byte = error.start + 1, line[error.start]
        raise UserError(
            f"{path}, line {number}: byte {position}, {byte:#04x}, is not UTF-8; write the file"
            " in that encoding, or remove the line"
        ) from error


def find_fault(path: Path) -> str | None:
    """Return the first line that is not a row like those before it, and why, or None."""
    kinds: dict[str, tuple[str, int]] = {}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                fault = _compare(_parse(line.rstrip()), kinds, number)
            except json.JSONDecodeError as error:
                problem = f"{error.msg.removesuffix(' at')} at character {error.colno}"
                fault = f"not JSON, {problem} of {_cut(line.decode().rstrip())}"
            except RecursionError:
                fault = "nested too deeply"
            except ValueError as error:
                fault = str(error)
            if fault:
                return f"{path}, line {number}: {fault}; correct or remove the line"
    return None


def _parse(line: bytes) -> dict[str, Any]:
    row = json.loads(line.decode(), object_pairs_hook=_reject_duplicates)
    if not isinstance(row, dict):
        raise UserError(f"{_cut(str(row))} is not an object such as {_EXAMPLE}")
    return row


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in names if names.count(name) > 1)
        raise UserError(f"key {duplicate!r} appears twice")
    return row


def _compare(row: Mapping[str, Any], kinds: dict[str, tuple[str, int]], number: int) -> str | None:
    """Note the kind of each value in `kinds`; return how one differs from earlier lines."""
    for name, value in row.items():
        if value is None:
            continue
        kind = _KINDS.get(type(value), "a number")
        before, first = kinds.setdefault(name, (kind, number))
        if kind != before:
            return f"{name!r} is {kind}, {_cut(str(value))}, but {before} in line {first}"
    return None


def _cut(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
