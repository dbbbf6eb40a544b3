"""A line of the table."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.system.bad_input.bench import Bench, Ended


def _train(bench: Bench) -> Ended:
    return bench.train()


@dataclass(frozen=True)
class Case:
    """`spoil` makes the bench's run a bad one, `start` is the command, `says` is in its error line:
    the value, the place, the way out."""

    name: str
    spoil: Callable[[Bench], Any]
    says: tuple[str, ...]
    start: Callable[[Bench], Ended] = _train
    code: int = 2
    holds: Callable[[Bench], None] | None = None


def change(**values: Any) -> Callable[[Bench], None]:
    return lambda bench: bench.change(**values)


def data(**values: Any) -> Callable[[Bench], None]:
    return lambda bench: bench.data(**values)


def rows(content: Any, name: str = "rows.jsonl", **values: Any) -> Callable[[Bench], None]:
    def spoil(bench: Bench) -> None:
        bench.rows(content, name)
        bench.data(**values)

    return spoil


def text(content: str) -> Callable[[Bench], None]:
    def spoil(bench: Bench) -> None:
        bench.text = content

    return spoil


def nothing(bench: Bench) -> None:
    """The command alone is what is bad."""
