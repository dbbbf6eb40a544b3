"""Types of columns that hold the values of several Parquet or Arrow files."""

from collections.abc import Sequence
from pathlib import Path

import datasets
import pyarrow as pa

from foundry_ext.utils.errors import UserError


def common_features(
    files: Sequence[Path], schemas: Sequence[pa.Schema], columns: Sequence[str] | None
) -> datasets.Features:
    """Return the columns of all files, each of a type that holds its values in all of them.

    Args:
        files: what is read.
        schemas: the schema of each file.
        columns: the columns to read, all by default. Types of others do not matter.

    Raises:
        UserError: no file has a column of `columns`, or the types of a column do not go together.
    """
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
