"""Rows of Parquet and Arrow files as one Arrow file, with the columns of all of them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.table import table_cast

from foundry_ext.utils.errors import UserError, naming

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
        UserError: a file cannot be read, or a column is text in one file and something else in
            another.
    """
    schema = _features(files, kind, columns).arrow_schema
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


def _features(files: Sequence[Path], kind: str, columns: Sequence[str] | None) -> datasets.Features:
    """Return the columns of all files.

    Raises:
        UserError: a column is text in one file and something else in another.
    """
    features: dict[str, tuple[Path, Any]] = {}
    for file in files:
        with naming(str(file), _ERRORS):
            schema = pq.read_schema(file) if kind == "parquet" else _open_arrow(file).schema
            found = datasets.Features.from_arrow_schema(schema)
        for name, feature in found.items():
            first, before = features.setdefault(name, (file, feature))
            if _type_name(before) == "null":
                features[name] = (file, feature)
            elif _type_name(feature) not in ("null", _type_name(before)):
                raise UserError(
                    f"{file}: column {name!r} is {_type_name(feature)}, but {_type_name(before)} in"
                    f" {first}; write it as one type in all files"
                )
    wanted = [name for name in features if columns is None or name in columns]
    return datasets.Features({name: features[name][1] for name in wanted})


def _type_name(feature: Any) -> str:
    dtype = str(getattr(feature, "dtype", feature))
    if dtype in ("string", "large_string"):
        return "text"
    return "integer" if dtype.lstrip("u").startswith("int") else dtype
