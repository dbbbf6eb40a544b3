"""Errors of one rank that all ranks raise, instead of waiting for it in the next collective."""

from collections.abc import Callable
from typing import Any, TypeVar

from composer.utils import dist

from foundry_ext.utils.errors import UserError, one_line

T = TypeVar("T")


def on_rank_zero(decide: Callable[[], T]) -> T:
    """Return, on every rank, what `decide` returns on rank 0, which alone calls it. A collective.

    Raises:
        UserError: on the other ranks, if `decide` raised an error; rank 0 raises that error itself.
    """
    error: Exception | None = None
    answer: list[Any] = [None, None]
    if dist.get_global_rank() == 0:
        try:
            answer[0] = decide()
        except Exception as caught:
            error, answer[1] = caught, _describe(caught)
    dist.broadcast_object_list(answer, src=0)
    result, refusal = answer
    _raise(error, refusal)
    return result


def on_every_rank(check: Callable[[], None]) -> None:
    """Call `check` on every rank; it must hold no collective. A collective.

    Raises:
        UserError: on every rank, if one raised an error: that of the first rank that did. This rank
            raises the error itself.
    """
    error: Exception | None = None
    try:
        check()
    except Exception as caught:
        error = caught
    refusals = dist.all_gather_object(error and _describe(error))
    _raise(error, next((text for text in refusals if text is not None), None))


def _raise(error: Exception | None, refusal: str | None) -> None:
    if error is not None and _describe(error) == refusal:
        raise error
    if refusal is not None:
        raise UserError(refusal) from error


def _describe(error: Exception) -> str:
    kind = "" if isinstance(error, UserError | OSError) else f"{type(error).__name__}: "
    return f"{kind}{one_line(error)}"
