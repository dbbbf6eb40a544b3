"""Rows of JSON files, exactly as the file writes them; faults are named by line.

A .jsonl is read line by line, and so is a .json that has one object per line. Any other .json, an
array or objects over several lines, is read whole.
"""

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from foundry_ext.data.files import suffixes
from foundry_ext.data.opening import UTF_8, decoding_fault, open_binary, text_encoding
from foundry_ext.data.rows import Row
from foundry_ext.utils.errors import UserError

_EXAMPLE = '{"prompt": "...", "response": "..."}'
_BOM = b"\xef\xbb\xbf"
_SPACE = " \t\r\n"  # JSON's


def read_json(
    path: Path, *, field: str | None = None, encoding: str | None = None
) -> Iterator[Row]:
    """Yield the rows of a file.

    Args:
        path: .jsonl, .ndjson or .json, compressed or not.
        field: key of the object that holds the array of rows, as in `datasets`.
        encoding: UTF-8 by default, with or without a byte order mark.

    Raises:
        UserError: a line is not an object, is not in the encoding, or repeats a key; there are no
            rows; or Python does not know the encoding.
    """
    encoding = text_encoding(path, encoding)
    with open_binary(path) as file:
        if field is None and (_is_of_lines(path) or _begins_with_a_row(file, encoding)):
            lines: Iterable[Any] = file  # of bytes, which are faster than those of a text stream
            if encoding != UTF_8:
                lines = io.TextIOWrapper(file, encoding, newline="\n")
            rows = read_lines(path, lines, encoding=encoding)
        else:
            rows = _read_whole(path, file, field, encoding)
        empty = True
        for row in rows:
            empty = False
            yield row
    if empty:
        raise UserError(f"{path} is empty; write one row per line, such as {_EXAMPLE}")


def _is_of_lines(path: Path) -> bool:
    return suffixes(path.name)[0] in (".jsonl", ".ndjson")


def _begins_with_a_row(file: BinaryIO, encoding: str) -> bool:
    """Return whether the first line is an object by itself."""
    line = next((line for line in file if line.removeprefix(_BOM).strip()), b"")
    file.seek(0)
    try:
        return isinstance(json.loads(line.decode(encoding)), dict)
    except (ValueError, RecursionError):
        return False


def read_lines(
    path: Path, lines: Iterable[Any], *, first: int = 1, encoding: str = UTF_8
) -> Iterator[Row]:
    """Yield the rows of lines of a file, one object per line.

    Args:
        path: the file, for errors.
        lines: bytes, or text if they are not in UTF-8.
        first: number of the first of these lines in the file.
        encoding: of the file, for errors.

    Raises:
        UserError: as in `read_json`.
    """
    try:
        for number, line in enumerate(lines, start=first):
            text = (line if isinstance(line, str) else line.decode()).rstrip(_SPACE)
            if number == 1:
                text = text.removeprefix("\ufeff")
            if not text:
                continue
            if text.lstrip(_SPACE)[0] != "{":
                raise UserError(
                    f"{path}, line {number}: {line[:40]!r} does not begin a JSON object; write one"
                    f" row per line, in UTF-8, such as {_EXAMPLE}"
                )
            yield Row(f"{path}, line {number}", _parse_line(path, number, text), len(text))
    except UnicodeDecodeError as error:
        raise decoding_fault(path, encoding, error) from error


def _parse_line(path: Path, number: int, text: str) -> dict[str, Any]:
    try:
        row = json.loads(text, object_pairs_hook=_reject_duplicates)
        # A surrogate can stand alone only if it is written as an escape.
        if "\\u" in text:
            _check_surrogates(row)
        return row
    except json.JSONDecodeError as error:
        problem = f"{error.msg.removesuffix(' at')} at character {error.colno}"
        fault = f"not JSON, {problem} of {cut(text)}"
    except RecursionError:
        fault = "nested too deeply"
    except ValueError as error:
        fault = str(error)
    raise UserError(f"{path}, line {number}: {fault}; correct or remove the line")


def _read_whole(path: Path, file: BinaryIO, field: str | None, encoding: str) -> Iterator[Row]:
    try:
        text = file.read().decode(encoding)
    except UnicodeDecodeError as error:
        raise decoding_fault(path, encoding, error) from error
    try:
        values = list(_values(text))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}: not JSON, {error.msg}; correct it"
        ) from error
    except (ValueError, RecursionError) as error:
        fault = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{path}: {fault}; correct it") from error
    if field is not None:
        if len(values) != 1 or not isinstance(values[0], dict) or field not in values[0]:
            raise UserError(f"{path}: hf_kwargs.field: no object with the key {field!r} in it")
        values = [values[0][field]]
    if len(values) == 1 and isinstance(values[0], list):
        values = values[0]
    size = len(text) // max(len(values), 1)
    for number, row in enumerate(values):
        # As in `datasets`: an array of texts has the one column `text`.
        row = {"text": row} if isinstance(row, str) else row
        if not isinstance(row, dict):
            raise UserError(
                f"{path}, row {number}: {cut(str(row))} is not an object such as {_EXAMPLE}"
            )
        yield Row(f"{path}, row {number}", row, size)


def _values(text: str) -> Iterator[Any]:
    """Yield the JSON values of a text that has nothing but white space between them."""
    decoder = json.JSONDecoder(object_pairs_hook=_reject_duplicates)
    at, end = 0, len(text.rstrip(_SPACE))
    while at < end:
        at = next(i for i in range(at, end) if text[i] not in _SPACE)
        value, at = decoder.raw_decode(text, at)
        if "\\u" in text:
            _check_surrogates(value)
        yield value


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in names if names.count(name) > 1)
        raise UserError(f"key {duplicate!r} appears twice")
    return row


def _check_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        text = error.object
        part = cut(text[max(error.start - 20, 0) : error.end + 20])
        raise UserError(
            f"\\u{ord(text[error.start]):04x} is half of a character, a lone surrogate, in {part};"
            " write both halves, or another character"
        ) from error


def cut(text: str) -> str:
    """Return the text in quotes, shortened to 60 characters."""
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
