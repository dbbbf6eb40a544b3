"""Rows of Parquet and Arrow files as one Arrow file, with the columns of all of them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets.table import table_cast

from foundry_ext.data.column_types import common_features
from foundry_ext.utils.errors import naming

_ERRORS = (pa.ArrowException, OSError, NotImplementedError)
_BATCH_ROWS = 1000


def write_tables(
    path: Path, files: Sequence[Path], kind: str, columns: Sequence[str] | None = None
) -> None:
    """Write the rows of files as an Arrow stream; a column that a file lacks is null there.

    Args:
        path: the stream to write.
        files: what to read.
        kind: "parquet" or "arrow", for both forms of Arrow files.
        columns: those to keep; all by default.

    Raises:
        UserError: a file cannot be read, no file has a column of `columns`, or the types of a
            column do not go together.
    """
    columns = [columns] if isinstance(columns, str) else columns
    schemas = [_schema(file, kind) for file in files]
    schema = common_features(files, schemas, columns).arrow_schema
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for file in files:
            for table in _tables(file, kind, schema):
                writer.write_table(table)


def _tables(file: Path, kind: str, schema: pa.Schema) -> Iterator[pa.Table]:
    with naming(str(file), _ERRORS):
        if kind == "parquet":
            batches = pq.ParquetFile(file).iter_batches(_BATCH_ROWS, columns=schema.names)
        else:
            batches = _arrow_batches(_open_arrow(file))
        for batch in batches:
            table = pa.Table.from_batches([batch])
            wanted = [name for name in table.column_names if name in schema.names]
            yield table_cast(table.select(wanted), schema)


def _open_arrow(file: Path) -> Any:
    source = pa.memory_map(str(file))
    try:
        return pa.ipc.open_stream(source)
    except (pa.ArrowInvalid, OSError):
        return pa.ipc.open_file(source)


def _arrow_batches(reader: Any) -> Iterator[pa.RecordBatch]:
    if isinstance(reader, pa.ipc.RecordBatchFileReader):
        return (reader.get_batch(i) for i in range(reader.num_record_batches))
    return iter(reader)


def _schema(file: Path, kind: str) -> pa.Schema:
    with naming(str(file), _ERRORS):
        return pq.read_schema(file) if kind == "parquet" else _open_arrow(file).schema
