"""A full disk under the cache of `datasets`, and how much space tokens need."""

import contextlib
import errno
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from textwrap import shorten

import datasets
import datasets.config
from datasets.exceptions import DatasetsError

from foundry_ext.utils.errors import one_line

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Text of common tokenizers has 3 to 5 bytes per token. Half of the usual need is taken for certain.
_TEXT_PER_TOKEN, _CERTAIN = 4, 0.5


@contextlib.contextmanager
def naming_full_disk() -> Iterator[None]:
    """Make an error of a full disk name the cache's folder and the variable that moves it."""
    try:
        yield
    except (OSError, DatasetsError) as error:
        cause = _find_full(error)
        if cause is None or "HF_DATASETS_CACHE" in str(error):
            raise
        said = shorten(one_line(cause), 160, placeholder=" ...")
        text = f"{_describe(cause.filename or 'the rows')} ({said})"
        raise OSError(errno.ENOSPC, text) from error


def check_space(
    rows: datasets.Dataset, columns: Collection[str], most_tokens: int | None, token_bytes: int
) -> None:
    """Check that the tokens of rows can fit on the disk of the cache.

    Args:
        rows: the rows to tokenise.
        columns: those of their columns that are text to tokenise; others are ignored.
        most_tokens: more tokens than this cannot result; None if there is no such limit.
        token_bytes: bytes of a token on the disk.

    Raises:
        OSError: less is free than they certainly need.
    """
    text = rows.data.select([name for name in rows.column_names if name in columns])
    # Below a selection of rows there is the whole table.
    num_bytes = text.nbytes * len(rows) / max(rows.data.num_rows, 1)
    check_space_for_text(num_bytes, most_tokens, token_bytes)


def check_space_for_text(num_bytes: float, most_tokens: int | None, token_bytes: int) -> None:
    """Check that the tokens of so many bytes of text can fit; see `check_space`."""
    need = num_bytes / _TEXT_PER_TOKEN * token_bytes
    if most_tokens is not None:
        need = min(need, most_tokens * token_bytes)
    if _free() < need * _CERTAIN:
        needed = f", of about {_megabytes(need)} needed"
        raise OSError(errno.ENOSPC, _describe("the rows' tokens", needed))


def _describe(what: str, needed: str = "") -> str:
    return (
        f"no space is left for {what}; make some on the disk of HF_DATASETS_CACHE,"
        f" {str(datasets.config.HF_DATASETS_CACHE)!r} ({_megabytes(_free())} free{needed}), or set"
        " that environment variable to a folder on another disk, and start the same command again"
    )


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"


def free_bytes(folder: Path) -> int:
    """Return the bytes that are free for a folder, which need not be there yet."""
    folder = folder.absolute()
    there = next(one for one in (folder, *folder.parents) if one.exists())
    return shutil.disk_usage(there).free


def _free() -> int:
    return free_bytes(Path(datasets.config.HF_DATASETS_CACHE))


def _find_full(error: BaseException | None) -> OSError | None:
    """Return the error of a full disk among an error and its causes, or None."""
    while error is not None:
        # The text is that of a check by `datasets`, which has no error number.
        if isinstance(error, OSError) and (
            error.errno in FULL or "Not enough disk space" in str(error)
        ):
            return error
        error = error.__cause__
    return None
