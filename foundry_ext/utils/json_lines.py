"""Files of JSON lines: one value per line."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from foundry_ext.utils.errors import UserError, naming_file


def read_lines(path: Path | str, *, growing: bool = False) -> Iterator[tuple[int, Any]]:
    """Yield (line number, value) of every line that is not blank.

    Args:
        path: the file, in UTF-8.
        growing: skip a last line without its newline, which a kill left incomplete.

    Raises:
        FileNotFoundError: the file does not exist.
        UserError: a line is not JSON; the message names the file and the line.
    """
    with Path(path).open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line.decode())
            except (ValueError, RecursionError) as error:
                if growing and not line.endswith(b"\n"):
                    return
                raise UserError(f"{path}, line {number}: not JSON ({error})") from error
            yield number, value


class HeldLines:
    """A file that lines are appended to; they are held back until it may be opened.

    Args:
        path: the file.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file: IO[str] | None = None
        self._held: list[str] = []

    def write(self, values: Iterable[Any]) -> None:
        """Append a line per value; once the file is open, a kill loses none of them.

        Raises:
            OSError: the file cannot be written; has its name.
        """
        self._held += [json.dumps(value) + "\n" for value in values]
        if self._file is not None:
            with naming_file(self.path):
                self._file.writelines(self._held)
                self._file.flush()
            self._held.clear()

    def open(self, *, resumed: bool) -> None:
        """Open the file as `open_lines` does, unless it is open, and write what was held back."""
        if self._file is None:
            with naming_file(self.path):
                self._file = open_lines(self.path, resumed=resumed)
            self.write([])

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def open_lines(path: Path, *, resumed: bool) -> IO[str]:
    """Open a file to append lines to.

    Args:
        path: the file. Its folder is created if needed.
        resumed: continue after the last complete line, because a kill may have left part of one.
            Otherwise the file is emptied.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        end = 0
        if resumed:
            file.seek(0)
            end = file.read().rfind(b"\n") + 1
        file.truncate(end)
    return path.open("a", encoding="utf-8")
