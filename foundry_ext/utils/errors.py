"""Errors that a user can fix, shown in one line, and helpers that write that line."""

import difflib
import os
from collections.abc import Iterable

TRACEBACK_VARIABLE = "FOUNDRY_EXT_TRACEBACK"


class UserError(ValueError):
    """A mistake in a user's input.

    Its message is one line that names the value, the place and the way out. Commands print it
    without a traceback. Bugs raise other exceptions, which keep their traceback.
    """


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
