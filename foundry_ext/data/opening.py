"""Opening of data files, which may be compressed, and the place of a byte that cannot be read."""

import bz2
import codecs
import contextlib
import gzip
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from foundry_ext.utils.errors import UserError, one_line

COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


@contextlib.contextmanager
def open_binary(path: Path) -> Iterator[BinaryIO]:
    """Open a file to read its bytes, decompressed if its name ends in .gz, .bz2 or .xz.

    Raises:
        UserError: the compressed data is cut or damaged.
    """
    opener: Any = COMPRESSED.get(path.suffix.lower(), open)
    try:
        with opener(path, "rb") as file:
            yield file
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of the data
            raise
        raise UserError(
            f"{path} cannot be decompressed ({one_line(error)}); it may be cut, or not compressed:"
            f" compress it again, or name it without {path.suffix}"
        ) from error


UTF_8 = "utf-8-sig"  # with or without a byte order mark, which is no text


def text_encoding(path: Path, encoding: Any) -> str:
    """Return the encoding to read a file with: `UTF_8` for UTF-8, else the given one.

    Raises:
        UserError: Python does not know the encoding.
    """
    encoding = "utf-8" if encoding is None else encoding
    try:
        " ".encode(encoding)  # others, such as base64, are not of texts
        return UTF_8 if codecs.lookup(encoding).name in ("utf-8", UTF_8) else encoding
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: hf_kwargs.encoding: {encoding!r} is not a text encoding that Python knows;"
            " give the file's own, such as utf-8, latin-1, cp1252 or utf-16"
        ) from error


def decoding_fault(path: Path, encoding: str, error: UnicodeDecodeError) -> UserError:
    """Return an error that names the line and the byte which are not in `text_encoding`'s."""
    name = "utf-8" if encoding == UTF_8 else encoding
    way_out = (
        "write the file in that encoding, or name its own, such as hf_kwargs: {encoding: latin-1}"
    )
    with open_binary(path) as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode(name)
            except UnicodeDecodeError as found:
                place = f"line {number}: byte {found.start + 1}, {line[found.start]:#04x}"
                return UserError(f"{path}, {place}, is not {name.upper()}; {way_out}")
    return UserError(f"{path} is not {name.upper()} ({error.reason}); {way_out}")
