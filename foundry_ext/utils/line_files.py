"""Files of lines that a run writes as it goes, and goes on with when it is resumed."""

from pathlib import Path
from typing import IO


def open_lines(path: Path, *, resumed: bool) -> IO[str]:
    """A run from its beginning replaces what another left; a resumed one goes on behind the last
    whole line, where a kill may have left a part of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        end = 0
        if resumed:
            file.seek(0)
            end = file.read().rfind(b"\n") + 1
        file.truncate(end)
    return path.open("a", encoding="utf-8")
