"""Rows of Parquet files as one Arrow file, with types that hold the values of all of them."""

from collections.abc import Sequence
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.table import table_cast

from foundry_ext.utils.errors import UserError, naming

_ERRORS = (pa.ArrowException, OSError, NotImplementedError)


def write_parquet(path: Path, files: Sequence[Path], columns: Sequence[str] | None = None) -> None:
    """Write the rows of Parquet files as an Arrow stream.

    A column that a file lacks is null in its rows.

    Args:
        path: what is written.
        files: the Parquet files.
        columns: the columns to read, all by default. Types of others do not matter.

    Raises:
        UserError: no file has a column of `columns`, or the types of a column do not go together.
    """
    schema = _features(files, [columns] if isinstance(columns, str) else columns).arrow_schema
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for file in files:
            with naming(str(file), _ERRORS):
                for batch in pq.ParquetFile(file).iter_batches(1000, columns=schema.names):
                    writer.write_table(table_cast(pa.Table.from_batches([batch]), schema))


def _features(files: Sequence[Path], columns: Sequence[str] | None) -> datasets.Features:
    """Return the columns of all files, each of a type that holds its values in all of them."""
    schemas = []
    for file in files:
        with naming(str(file), _ERRORS):
            schemas.append(pq.read_schema(file))
    found = list(dict.fromkeys(name for schema in schemas for name in schema.names))
    missing = [name for name in columns or () if name not in found]
    if missing:
        raise UserError(
            f"hf_kwargs.columns: {missing[0]!r} is no column of {files[0]}; the columns are"
            f" {', '.join(found)}"
        )
    features = datasets.Features()
    for name in found:
        if columns is None or name in columns:
            have = [(file, _one(schema, name)) for file, schema in zip(files, schemas, strict=True)]
            features.update(_column([(file, one) for file, one in have if one is not None]))
    return features


def _one(schema: pa.Schema, name: str) -> pa.Schema | None:
    """Return the schema of one column, with the labels that `datasets` notes beside it."""
    return pa.schema([schema.field(name)], schema.metadata) if name in schema.names else None


def _column(schemas: Sequence[tuple[Path, pa.Schema]]) -> datasets.Features:
    """Return the feature of one column of several files.

    Whole numbers of several sizes become the largest, and whole numbers beside fractions become
    fractions. The keys of objects are those of all files.
    """
    first, features = schemas[0][0], _as_features(*schemas[0])
    for file, schema in schemas[1:]:
        others = _as_features(file, schema)
        if others == features:
            continue
        one, other = _name(features), _name(others)
        try:
            if {"text"} < {one, other} - {"null"}:
                raise pa.ArrowTypeError("text stays as it is written")
            merged = pa.unify_schemas(
                [features.arrow_schema, others.arrow_schema], promote_options="permissive"
            )
        except pa.ArrowException as error:
            raise UserError(
                f"{file}: column {schema.names[0]!r} is {other}, but {one} in {first}; write it as"
                " one type in all files, or name the columns to read in hf_kwargs.columns"
            ) from error
        if one == "null":
            first = file
        features = datasets.Features.from_arrow_schema(merged)
    return features


def _as_features(file: Path, schema: pa.Schema) -> datasets.Features:
    try:
        return datasets.Features.from_arrow_schema(schema)
    except ValueError as error:  # of a type that `datasets` has not
        raise UserError(
            f"{file}: column {schema.names[0]!r} is {schema.types[0]}, which is not read; write it"
            " as another type, or name the columns to read in hf_kwargs.columns"
        ) from error


def _name(features: datasets.Features) -> str:
    (feature,) = features.values()
    name = str(getattr(feature, "dtype", feature))
    return "text" if name in ("string", "large_string") else name
