"""What is wrong with a file of JSON rows, by the number of its line.

pyarrow, which reads them, counts rows from the beginning of a block, and takes some files for rows
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
    """Rows must be objects. pyarrow 19 takes most others for rows without values, and ends the
    process without a word (SIGSEGV) where one of its blocks begins with `null`.

    Raises:
        UserError: a line that is no UTF-8 or begins no object, or no rows at all.
    """
    only_null = path.suffix != ".jsonl"  # the objects of a .json may go over many lines
    found = False
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            _decode(path, line, number)
            start = line.lstrip()[:4]
            if start[:1] in (b"", b"{") or (only_null and start != b"null"):
                if start[:1] == b"[":  # one array of them all
                    return
                found = found or start != b""
                continue
            raise UserError(
                f"{path}, line {number}: {line[:40]!r} begins no JSON object; give one row a line,"
                f" in UTF-8, such as {_EXAMPLE}"
            )
    if not found:
        raise UserError(f"{path} is empty; give one row a line, such as {_EXAMPLE}")


def _decode(path: Path, line: bytes, number: int) -> None:
    try:
        line.decode()
    except UnicodeDecodeError as error:
        place, byte = error.start + 1, line[error.start]
        raise UserError(
            f"{path}, line {number}: byte {place}, {byte:#04x}, is not UTF-8; write the file in"
            " that encoding, or remove the line"
        ) from error


def find_fault(path: Path) -> str | None:
    """The first line that is no row, or no row like those before it, and why; None if all are.

    Args:
        path: one row a line, in UTF-8, see `check_lines`.
    """
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
                fault = "nested too deeply to be read"
            except ValueError as error:
                fault = str(error)
            if fault:
                return f"{path}, line {number}: {fault}; correct or remove the line"
    return None


def _parse(line: bytes) -> dict[str, Any]:
    row = json.loads(line.decode(), object_pairs_hook=_without_doubles)
    if not isinstance(row, dict):
        raise UserError(f"{_cut(str(row))} is no object, such as {_EXAMPLE}")
    return row


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise UserError(f"key {double!r} is there twice")
    return row


def _compare(row: Mapping[str, Any], kinds: dict[str, tuple[str, int]], number: int) -> str | None:
    """Notes the kind of each value in `kinds`, and says where one differs from before."""
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
