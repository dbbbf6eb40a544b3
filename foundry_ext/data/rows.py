"""Rows of files as an Arrow file, each value as the file writes it.

`datasets` guesses types: 007 becomes 7, "2021-05-03" a time, and whole numbers beside fractions
fractions. Here a column has an Arrow type only if all its values have that type in the file. Any
other column is kept as JSON, and read back as it was.
"""

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import datasets
import pyarrow as pa
from datasets.features.features import register_feature
from llmfoundry.utils.exceptions import (
    ALLOWED_MESSAGES_KEYS,
    ALLOWED_PROMPT_KEYS,
    ALLOWED_RESPONSE_KEYS,
)

from foundry_ext.utils.errors import UserError


class Row(NamedTuple):
    """A row of a file."""

    place: str
    """File and line, for errors."""
    values: dict[str, Any]
    size: int
    """Characters, about."""


@dataclass
class JsonValue:
    """Feature of `datasets` for values of several types: JSON text, decoded when it is read."""

    pa_type: ClassVar[Any] = pa.string()
    decode: ClassVar[bool] = True
    dtype: ClassVar[str] = "string"
    _type: str = field(default="FoundryExtJsonValue", init=False, repr=False)

    def __call__(self) -> pa.DataType:
        return self.pa_type

    def encode_example(self, value: Any) -> str:
        return json.dumps(value)

    def decode_example(self, value: str, token_per_repo_id: Any = None) -> Any:
        try:
            return json.loads(value)
        except RecursionError as error:
            raise UserError(
                f"a value is nested too deeply, {value[:40]}...; write it with fewer levels"
            ) from error


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it is experimental
    register_feature(JsonValue, "FoundryExtJsonValue")

_ROLES = {*ALLOWED_MESSAGES_KEYS, *ALLOWED_PROMPT_KEYS, *ALLOWED_RESPONSE_KEYS}
_NOTHING = (None, "", [], {})
_BATCH_ROWS, _BATCH_CHARACTERS = 1000, 2**24
_MOST_LEVELS = 50  # of a value with an Arrow type; Arrow reads files of at most 64
_NAMES = {"string": "text", "bool": "true or false", "int64": "a number", "float64": "a number"}


def write_rows(path: Path, read: Callable[[], Iterable[Row]]) -> None:
    """Write rows as an Arrow stream; `read` is called twice, first to learn the columns' types.

    Memory holds one batch of rows, however many there are.

    Raises:
        UserError: a value differs in kind from those before it, such as a number from text.
    """
    kinds = _column_kinds(read())
    features = _features(kinds)
    schema = features.arrow_schema
    json_columns = {name for name, kind in kinds.items() if kind == "json"}
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for rows in _batches(read()):
            columns = [
                pa.array([_encode(row.get(name), name in json_columns) for row in rows], type)
                for name, type in zip(schema.names, schema.types, strict=True)
            ]
            writer.write_batch(pa.record_batch(columns, schema=schema))


def _encode(value: Any, as_json: bool) -> Any:
    return json.dumps(value) if as_json and value is not None else value


def _batches(rows: Iterable[Row]) -> Iterator[list[dict[str, Any]]]:
    batch, size = [], 0
    for row in rows:
        batch.append(row.values)
        size += row.size
        if len(batch) == _BATCH_ROWS or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# A kind is None (null so far), the name of an Arrow type, [kind] for a list, {name: kind} for an
# object, or "json" for values that no Arrow type holds as they are. Objects with other keys, or in
# another order, are such values: Arrow would give each of them the keys of all, as nulls.


def _column_kinds(rows: Iterable[Row]) -> dict[str, Any]:
    kinds: dict[str, Any] = {}
    firsts: dict[str, tuple[str, str]] = {}
    for row in rows:
        for name, value in row.values.items():
            if type(value) is str and kinds.get(name) == "string":  # most are
                continue
            kind = _kind(value)
            if kind is not None:
                _check_same(row.place, name, value, kind, firsts)
            kinds[name] = _merge(kinds.get(name), kind)
        if not kinds:
            raise UserError(f"{row.place}: a row without keys; correct or remove it")
    return kinds


def _check_same(
    place: str, name: str, value: Any, kind: Any, firsts: dict[str, tuple[str, str]]
) -> None:
    """Refuse a value that is text in one row and something else in another."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        shown = "a number"
    elif isinstance(value, list | dict):
        shown = "a list" if isinstance(value, list) else "an object"
    else:
        shown = _NAMES[kind]
    before, first = firsts.setdefault(name, (shown, place))
    if shown != before:
        file, _, line = first.rpartition(", ")
        where = line if place.startswith(f"{file}, ") else first
        value = str(value) if len(str(value)) <= 60 else f"{str(value)[:57]}..."
        raise UserError(
            f"{place}: {name!r} is {shown}, {value!r}, but {before} in {where}; correct or remove"
            " the row"
        )


def _kind(value: Any, level: int = 0) -> Any:
    if value is None:
        return None
    if level > _MOST_LEVELS:
        return "json"
    if isinstance(value, dict):
        kinds = {name: _kind(one, level + 1) for name, one in value.items()}
        return "json" if not kinds or "json" in kinds.values() else kinds
    if isinstance(value, list):
        child = None
        for one in value:
            child = _merge(child, _kind(one, level + 1))
        return "json" if child == "json" else [child]
    if isinstance(value, int) and not isinstance(value, bool):
        return "int64" if -(2**63) <= value < 2**63 else "json"
    return {str: "string", bool: "bool", float: "float64"}[type(value)]


def _merge(one: Any, other: Any) -> Any:
    if one is None or other is None:
        return other if one is None else one
    if isinstance(one, list) and isinstance(other, list):
        child = _merge(one[0], other[0])
        return "json" if child == "json" else [child]
    if isinstance(one, dict) and isinstance(other, dict):
        if list(one) != list(other):
            return "json"
        kinds = {name: _merge(kind, other[name]) for name, kind in one.items()}
        return "json" if "json" in kinds.values() else kinds
    return one if one == other else "json"


def _features(kinds: dict[str, Any]) -> datasets.Features:
    schema = pa.schema([(name, _arrow_type(kind)) for name, kind in kinds.items()])
    features = datasets.Features.from_arrow_schema(schema)
    for name in (name for name, kind in kinds.items() if kind == "json"):
        features[name] = JsonValue()
    return features


def _arrow_type(kind: Any) -> pa.DataType:
    if isinstance(kind, list):
        return pa.list_(_arrow_type(kind[0]))
    if isinstance(kind, dict):
        return pa.struct([(name, _arrow_type(one)) for name, one in kind.items()])
    if kind is None:
        return pa.null()
    return pa.string() if kind == "json" else pa.type_for_alias(kind)


def without_empty_columns(rows: datasets.Dataset) -> datasets.Dataset:
    """Return the rows without columns that hold nothing in any row, such as a spreadsheet's last.

    Those of a prompt, a response or messages stay, because rows without them are faults.
    """
    extra = [name for name in rows.column_names if name not in _ROLES]
    return rows.remove_columns([name for name in extra if _is_empty(rows, name)])


def without_empty_keys(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows without keys that hold nothing in any of them, as `without_empty_columns`."""
    keys = dict.fromkeys(key for row in rows for key in row)
    full = {key for key in keys if any(row.get(key) not in _NOTHING for row in rows)} | _ROLES
    return [{key: value for key, value in row.items() if key in full} for row in rows]


def _is_empty(rows: datasets.Dataset, name: str) -> bool:
    feature = rows.features[name]
    no_items = datasets.Sequence(datasets.Value("null"))
    may_be_empty = isinstance(feature, JsonValue) or feature == no_items
    if not may_be_empty and getattr(feature, "dtype", None) not in ("string", "large_string"):
        return getattr(feature, "dtype", None) == "null"
    batches = cast(Iterator[dict[str, Any]], rows.select_columns([name]).iter(_BATCH_ROWS))
    return all(value in _NOTHING for batch in batches for value in batch[name])
