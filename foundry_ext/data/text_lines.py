"""Rows of text files: a line, a paragraph or a whole file is a row with the one column `text`."""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path

from foundry_ext.data.opening import decoding_fault, open_binary, text_encoding
from foundry_ext.data.rows import Row
from foundry_ext.utils.errors import UserError


def read_text(
    path: Path,
    *,
    encoding: str | None = None,
    keep_linebreaks: bool = False,
    sample_by: str = "line",
) -> Iterator[Row]:
    """Yield the rows of a file, as the builder "text" of `datasets` does.

    Args:
        path: the file, compressed or not.
        encoding: UTF-8 by default, with or without a byte order mark.
        keep_linebreaks: keep the line break at the end of each line, as one newline.
        sample_by: "line", "paragraph" (ended by an empty line) or "document".

    Raises:
        UserError: unknown `sample_by` or encoding, or the file is not in it; names the line.
    """
    readers = {"line": _lines, "paragraph": _paragraphs, "document": _document}
    if sample_by not in readers:
        raise UserError(f"hf_kwargs.sample_by: {sample_by!r}; give {', '.join(readers)}")
    encoding = text_encoding(path, encoding)
    with open_binary(path) as file:
        text = io.TextIOWrapper(file, encoding)
        try:
            for number, value in enumerate(readers[sample_by](text), start=1):
                if sample_by == "line" and not keep_linebreaks:
                    value = value.removesuffix("\n")
                yield Row(f"{path}, {sample_by} {number}", {"text": value}, len(value))
        except UnicodeDecodeError as error:
            raise decoding_fault(path, encoding, error) from error


def _lines(text: Iterable[str]) -> Iterable[str]:
    return text


def _paragraphs(text: Iterable[str]) -> Iterator[str]:
    """Yield what `split` at two newlines gives, without what is empty."""
    lines = []
    for line in text:
        lines.append(line)
        if line == "\n" and len(lines) > 1:
            yield from filter(None, ["".join(lines)[:-2]])
            lines = []
    yield from filter(None, ["".join(lines)])


def _document(text: io.TextIOBase) -> Iterator[str]:
    yield text.read()
