"""Mark `more` for single cases of a test, which `make test-all` runs."""

from collections.abc import Iterable
from typing import Any

import pytest


def one_of(cases: Iterable[Any], chosen: Any) -> list[Any]:
    """Return the cases for `parametrize`, all but the chosen one marked `more`.

    `make test` runs the chosen one, `make test-all` every one:

        @pytest.mark.parametrize("method", one_of(kit.METHODS, "dora"))
    """
    cases = list(cases)
    assert chosen in cases, f"{chosen!r} is none of {cases}"
    return [case if case == chosen else _more(case) for case in cases]


def _more(case: Any) -> Any:
    values = case if isinstance(case, tuple) else (case,)  # a tuple is of several arguments
    return pytest.param(*values, marks=pytest.mark.more)
