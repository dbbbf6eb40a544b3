"""One case of the table."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.system.bad_input.bench import Bench, Ended


def _train(bench: Bench) -> Ended:
    return bench.train()


@dataclass(frozen=True)
class Case:
    """A case: `spoil` breaks the bench's run and `start` is the command. Its error line contains
    `says`: the value, the place, the way out."""

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
    """Change nothing, because only the command is bad."""
