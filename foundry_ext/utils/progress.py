"""Progress of long work, with the time left.

It is a bar on a terminal and in a notebook, and a line per minute in a log. Steps that cannot say
how far they are have a line on a terminal when they begin.
"""

import sys
from collections.abc import Iterable, Iterator
from typing import TextIO, TypeVar

from tqdm import tqdm

LOG_SECONDS = 60.0
"""Time between two lines in a log; work that is done sooner writes none."""
_BAR_SECONDS = 1.0  # before a bar appears

Element = TypeVar("Element")


class _Bar(tqdm):
    monitor_interval = 0  # no thread that watches the bars


class _Lines:
    """A stream for tqdm that writes whole lines where tqdm would write over the last one."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> None:
        if text.strip():
            self.stream.write(text.strip() + "\n")

    def flush(self) -> None:
        self.stream.flush()


def progress(
    elements: Iterable[Element], name: str, *, total: int, unit: str, shown: bool = True
) -> Iterator[Element]:
    """Yield the elements, and show on stderr how many are done and how long the rest will take.

    Args:
        elements: what is worked on, one after another.
        name: of the work.
        total: number of elements.
        unit: what an element is.
        shown: show nothing if False, as on all ranks but one.
    """
    has_bar = _is_watched()
    bar = _Bar(
        elements,
        name,
        total=total,
        unit=f" {unit}",
        file=sys.stderr if has_bar else _Lines(sys.stderr),  # pyright: ignore
        leave=False,
        miniters=1,
        mininterval=0.2 if has_bar else LOG_SECONDS,
        delay=_BAR_SECONDS if has_bar else LOG_SECONDS,
        disable=not shown,
    )
    try:
        yield from bar
    finally:
        bar.close()


def announce(step: str) -> None:
    """Print a line about a long step that begins now, to stderr and only if somebody watches.

    A log gets none, as from git and from `progress`: a script that reads stderr wants errors.
    """
    if _is_watched():
        print(f"{step} ...", file=sys.stderr, flush=True)


def _is_watched() -> bool:
    return sys.stderr.isatty() or is_notebook(sys.stderr)


def is_notebook(stream: TextIO) -> bool:
    """Return whether the stream is shown below a cell of a notebook, not by a terminal."""
    return type(stream).__module__.partition(".")[0] == "ipykernel"
