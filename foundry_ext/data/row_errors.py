"""Errors about a row: they name it, say what is wrong, and what rows can be read."""

from collections.abc import Callable, Iterable
from typing import Any

from llmfoundry.utils.exceptions import (
    ALLOWED_MESSAGES_KEYS,
    ALLOWED_PROMPT_KEYS,
    ALLOWED_RESPONSE_KEYS,
    BaseContextualError,
    UnknownExampleTypeError,
)

from foundry_ext.utils.errors import UserError

_ROWS = (
    "; a row has a prompt and a response, both text, or messages: correct it, or set"
    " preprocessing_fn to a function that makes such rows"
)


def naming_row(place: int | str, function: Callable[[Any], Any], row: Any) -> Any:
    """Return function(row).

    Raises:
        UserError: the function raised anything; names the row, by its number from 0 or by a place
            such as `rows.jsonl, line 3`, and what it lacks.
    """
    try:
        return function(row)
    except Exception as error:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        fault = _explain(error, row if isinstance(row, dict) else {})
        name = f"row {place}" if isinstance(place, int) else place
        raise UserError(f"{name}: {kind}{fault}") from error


def _explain(error: Exception, row: dict[str, Any]) -> str:
    if not isinstance(error, BaseContextualError | KeyError):
        return str(error)
    nulls = [repr(name) for name, value in row.items() if value is None]
    separator = separator_hint(row)
    # The same error is raised about the keys of a message, in a row whose columns are right.
    if isinstance(error, UnknownExampleTypeError) and not _are_known({*row}):
        # Arrow has one column for each key of any row.
        lacks = f"; it has no {' or '.join(nulls)}, which others have" if nulls else ""
        names = ", ".join(map(repr, row))
        return f"the row has the columns {names}{lacks}{separator or _columns(row)}"
    lacks = f"; its {' and '.join(nulls)} is null, or missing" if nulls else ""
    return f"{error}{lacks}{separator or _ROWS}"


def _are_known(columns: set[str]) -> bool:
    sides = columns & ALLOWED_PROMPT_KEYS and columns & ALLOWED_RESPONSE_KEYS
    return columns <= ALLOWED_MESSAGES_KEYS or bool(sides and len(columns) == 2)


def _columns(row: dict[str, Any]) -> str:
    prompt, response, messages = (
        " or ".join(sorted(names, reverse=True))
        for names in (ALLOWED_PROMPT_KEYS, ALLOWED_RESPONSE_KEYS, ALLOWED_MESSAGES_KEYS)
    )
    is_whole = messages in row or (prompt in row and {*row} & ALLOWED_RESPONSE_KEYS)
    way_out = "remove the others" if is_whole else "rename them"
    return (
        f"; a row has a prompt and a response, in columns {prompt} and {response}, or {messages}"
        f" alone: {way_out}, or set preprocessing_fn to a function that makes such rows"
    )


def separator_hint(columns: Iterable[str]) -> str:
    """Return the way out if a single column's name seems to be those of several, otherwise ""."""
    columns = list(columns)
    separator = next((one for one in ";\t|" if len(columns) == 1 and one in columns[0]), None)
    if separator is None:
        return ""
    shown = '"\\t"' if separator == "\t" else f"'{separator}'"
    return (
        f"; its columns seem to be separated by {shown}: for a CSV file set hf_kwargs:"
        f" {{sep: {shown}}}"
    )
