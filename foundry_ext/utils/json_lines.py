"""Files of JSON lines: one value per line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from foundry_ext.utils.errors import UserError


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
