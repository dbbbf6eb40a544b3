"""Mistakes of users, which are told in one line, and how that line is written."""

import difflib
import os
from collections.abc import Iterable

TRACEBACK_VARIABLE = "FOUNDRY_EXT_TRACEBACK"


class UserError(ValueError):
    """A mistake in what a user gave.

    Its message is one line that names the value, the place and the way out. Commands print it
    without a traceback. Mistakes of our own raise anything else, and keep theirs.
    """


def wants_traceback() -> bool:
    """Return whether --traceback, or its environment variable, asks for every traceback."""
    return os.environ.get(TRACEBACK_VARIABLE, "0") != "0"


def one_line(text: object) -> str:
    """Return the text with every run of white space made one space."""
    return " ".join(str(text).split())


def suggest(name: object, known: Iterable[object]) -> str:
    """Return `, did you mean 'model'?` for `modle` or `mod`, or "" if no known name is near."""
    name, names = str(name), list(map(str, known))
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    near = near or [other for other in names if len(name) > 2 and other.startswith(name)]
    return f", did you mean {near[0]!r}?" if near else ""
