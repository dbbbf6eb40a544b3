"""Pieces of a source: each becomes one shard, and is the most that a kill loses per process.

| source | piece |
|---|---|
| `.jsonl` and `.ndjson` files, not compressed | a range of bytes, cut at lines |
| `.parquet` files | consecutive row groups |
| anything else that `load_rows` reads | a range of rows of the table that `datasets` caches |

A piece is known by its content: rows that are added to a file change its last piece only, and a
copy of the file has the same pieces.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from datasets.table import table_cast

from foundry_ext.data.batches import row_sizes, split_rows
from foundry_ext.data.cache import hash_rows
from foundry_ext.data.column_types import common_features
from foundry_ext.data.files import suffixes
from foundry_ext.data.json_lines import read_lines
from foundry_ext.utils.errors import naming

Row = dict[str, Any]
PARQUET_ERRORS = (pa.ArrowException, OSError, NotImplementedError)
_BLOCK_BYTES = 2**20
_MOST_ROWS = 2**20  # of a piece of a table


class Piece(ABC):
    """A part of a source, with the rows of one shard."""

    size: int
    """Bytes, about; for progress."""
    source: str
    """The file, or the name of the data."""
    label: str
    """The part of the source, such as `rows 0 to 100`."""

    @property
    def name(self) -> str:
        """Source and part, for errors."""
        return f"{self.source}, {self.label}"

    @abstractmethod
    def digest(self) -> str:
        """Return a hash of its content, the same in any file and at any place."""

    @abstractmethod
    def rows(self) -> Iterator[tuple[str, Row]]:
        """Yield each row, and where it lies, for errors."""

    def located(self) -> "Piece":
        """Return the piece with exact places of its rows, which may take a while to find out."""
        return self


class LinesPiece(Piece):
    """The rows of a JSON-lines file whose lines start in a range of its bytes."""

    def __init__(self, path: Path, start: int, end: int, first_line: int | None = None):
        self.path, self.start, self.end, self.first_line = path, start, end, first_line
        self.size = end - start
        self.source, self.label = str(path), f"bytes {start} to {end}"

    def digest(self) -> str:
        digest = xxhash.xxh3_128()
        for block in self._blocks():
            digest.update(block)
        return digest.hexdigest()

    def _blocks(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            file.seek(self.start)
            while left := self.end - file.tell():
                block = file.read(min(left, _BLOCK_BYTES))
                if not block:
                    return
                yield block

    def rows(self) -> Iterator[tuple[str, Row]]:
        with self.path.open("rb") as file:
            file.seek(self.start)
            lines = _lines_until(file, self.end)
            for row in read_lines(self.path, lines, first=self.first_line or 1):
                yield row.place, row.values

    def located(self) -> Piece:
        if self.first_line is not None:
            return self
        before = LinesPiece(self.path, 0, self.start)._blocks()
        return LinesPiece(
            self.path, self.start, self.end, 1 + sum(block.count(b"\n") for block in before)
        )


def _lines_until(file: Any, end: int) -> Iterator[bytes]:
    at = file.tell()
    while at < end:
        line = file.readline()
        if not line:
            return
        at += len(line)
        yield line


def split_lines(path: Path, piece_bytes: int) -> list[Piece]:
    """Return the pieces of a JSON-lines file, of about `piece_bytes` each."""
    size, cuts = path.stat().st_size, [0]
    with path.open("rb") as file:
        for target in range(piece_bytes, size, piece_bytes):
            if target <= cuts[-1]:  # a line longer than a piece
                continue
            file.seek(target - 1)
            file.readline()
            if cuts[-1] < file.tell() < size:
                cuts.append(file.tell())
    cuts.append(size)
    return [LinesPiece(path, start, end) for start, end in pairwise(cuts)]


class GroupsPiece(Piece):
    """Consecutive row groups of a Parquet file."""

    def __init__(self, path: Path, groups: range, schema: pa.Schema, size: int):
        self.path, self.groups, self.schema, self.size = path, groups, schema, size
        self.source, self.label = str(path), f"row groups {groups.start} to {groups.stop}"

    def digest(self) -> str:
        """Hash the columns' compressed bytes, which differ between writers of the same rows."""
        metadata = pq.read_metadata(self.path)
        digest = xxhash.xxh3_128(str(self.schema).encode())
        with self.path.open("rb") as file:
            for group in self.groups:
                part = metadata.row_group(group)
                for column in map(part.column, range(part.num_columns)):
                    starts = (column.dictionary_page_offset, column.data_page_offset)
                    file.seek(min(start for start in starts if start is not None))
                    digest.update(file.read(column.total_compressed_size))
        return digest.hexdigest()

    def rows(self) -> Iterator[tuple[str, Row]]:
        with naming(str(self.path), PARQUET_ERRORS):
            file = pq.ParquetFile(self.path)
            number = sum(file.metadata.row_group(i).num_rows for i in range(self.groups.start))
            names = [name for name in self.schema.names if name in file.schema_arrow.names]
            for batch in file.iter_batches(row_groups=list(self.groups), columns=names):
                table = table_cast(pa.Table.from_batches([batch]), self.schema)
                for row in table.to_pylist():
                    yield f"{self.path}, row {number}", row
                    number += 1


def split_groups(path: Path, schema: pa.Schema, piece_bytes: int) -> list[Piece]:
    """Return the pieces of a Parquet file, of about `piece_bytes` each before compression."""
    with naming(str(path), PARQUET_ERRORS):
        metadata = pq.read_metadata(path)
    pieces: list[Piece] = []
    start, size = 0, 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= piece_bytes or group == metadata.num_row_groups - 1:
            pieces.append(GroupsPiece(path, range(start, group + 1), schema, size))
            start, size = group + 1, 0
    return pieces


class TablePiece(Piece):
    """Consecutive rows of a table."""

    def __init__(self, table: datasets.Dataset, rows: range, size: int, name: str):
        self.table, self.range, self.size, self.source = table, rows, size, name
        self.label = f"rows {rows.start} to {rows.stop}"

    def _part(self) -> datasets.Dataset:
        return self.table.select(self.range)

    def digest(self) -> str:
        return hash_rows(self._part())

    def rows(self) -> Iterator[tuple[str, Row]]:
        for number, row in zip(self.range, self._part(), strict=True):
            yield f"row {number}", row  # pyright: ignore


def split_table(table: datasets.Dataset, name: str, piece_bytes: int) -> list[Piece]:
    """Return the pieces of a table, of about `piece_bytes` each."""
    sizes = row_sizes(table)
    ranges = split_rows(sizes, most_bytes=piece_bytes, most_rows=_MOST_ROWS)
    return [
        TablePiece(table, rows, int(sizes[rows.start : rows.stop].sum()), name) for rows in ranges
    ]


def split_files(
    files: Sequence[Path], options: Mapping[str, Any], piece_bytes: int
) -> list[Piece] | None:
    """Return the pieces of files that can be read in parts; None if these cannot.

    Raises:
        UserError: a Parquet file cannot be read, or its columns do not go with those of another.
    """
    kinds = {suffixes(path.name) for path in files}
    if kinds <= {(".jsonl", ""), (".ndjson", "")} and not options:
        return [piece for path in files for piece in split_lines(path, piece_bytes)]
    if kinds == {(".parquet", "")} and not set(options) - {"columns"}:
        columns = options.get("columns")
        columns = [columns] if isinstance(columns, str) else columns
        schemas = []
        for path in files:
            with naming(str(path), PARQUET_ERRORS):
                schemas.append(pq.read_schema(path))
        schema = common_features(files, schemas, columns).arrow_schema
        return [piece for path in files for piece in split_groups(path, schema, piece_bytes)]
    return None


def describe_pieces(pieces: Sequence[Piece]) -> str:
    """Return a digest of the pieces, which reads little of them.

    A file counts by its name, its size and a megabyte at both ends, not by its folder.
    """
    digest = xxhash.xxh3_128()
    for source in dict.fromkeys(piece.source for piece in pieces):
        digest.update(_ends_of(Path(source)) if Path(source).is_file() else source.encode())
    for piece in pieces:
        digest.update(json.dumps([piece.label, piece.size]).encode())
    return digest.hexdigest()


def _ends_of(path: Path) -> bytes:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_BLOCK_BYTES)
        file.seek(max(size - _BLOCK_BYTES, 0))
        return f"{path.name} {size}".encode() + start + file.read(_BLOCK_BYTES)
