"""Errors that a user can fix, shown in one line, and helpers that write that line."""

import contextlib
import difflib
import os
import re
import reprlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

TRACEBACK_VARIABLE = "FOUNDRY_EXT_TRACEBACK"
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = (
    200  # characters of a value that an error shows
)


class UserError(ValueError):
    """A mistake in a user's input.

    Its message is one line that names the value, the place and the way out. Commands print it
    without a traceback. Bugs raise other exceptions, which keep their traceback.
    """


@contextlib.contextmanager
def naming(place: str, kinds: tuple[type[Exception], ...] = (ValueError,)) -> Iterator[None]:
    """Turn a library's errors about something of the user's into a UserError that names it.

    Args:
        place: a file, a folder, or a key of the YAML and its value.
        kinds: the errors to turn.
    """
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        raise UserError(f"{place}: {one_line(error)} [{type(error).__name__}]") from error


def shortened(value: object) -> str:
    """Return a value as an error shows it; of long texts, numbers and lists only a part."""
    return _SHORT.repr(value)


@contextlib.contextmanager
def naming_file(path: os.PathLike[str]) -> Iterator[None]:
    """Give an OSError without a file, as a write to a full disk raises it, the name of the file."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = os.fspath(path)
        raise


def wants_traceback() -> bool:
    """Return whether --traceback, or its environment variable, asks for tracebacks."""
    return os.environ.get(TRACEBACK_VARIABLE, "0") != "0"


def one_line(text: object) -> str:
    """Return the text with every run of whitespace replaced by one space.

    An exception without a text is shown by the name of its class.
    """
    shown = " ".join(str(text).split())
    return shown or (type(text).__name__ if isinstance(text, BaseException) else "")


def suggest(name: object, known: Iterable[object]) -> str:
    """Return `, did you mean 'model'?` for `modle` or `mod`, or "" if no known name is similar."""
    name, names = str(name), list(map(str, known))
    similar = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    similar = similar or [other for other in names if len(name) > 2 and other.startswith(name)]
    return f", did you mean {similar[0]!r}?" if similar else ""


def explain_invalid(error: "ValidationError", known: Iterable[str]) -> str:
    """Return one of pydantic's errors as a line: key, value, and what the value must be.

    Example: `seed: '17' must be a valid integer`. An unknown key comes first, because it may be a
    misspelt one that is then missing.
    """
    errors = error.errors(include_url=False)
    first = min(errors, key=lambda fault: fault["type"] != "extra_forbidden")
    key = one_line(".".join(map(str, first["loc"])))  # a file's own keys may hold anything
    if first["type"] == "missing":
        return f"{key}: missing"
    if first["type"] == "extra_forbidden":
        known = list(known)
        return f"{key}: unknown key{suggest(key, known) or ';'} the keys are {', '.join(known)}"
    # "Input should be a valid integer" becomes "must be a valid integer".
    message = first["msg"].removeprefix("Value error, ").partition(" or instance of")[0]
    message = re.sub(r"^(Input|String) should ", "must ", message)
    return f"{key}: {_SHORT.repr(first['input'])} {message}"
