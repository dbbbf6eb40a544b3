"""A run's record, `outputs/<run>/record.json`: its settings, costs and curves. Schema 1.

`SCHEMA` below names every key and its type. What the keys mean, and their units:

- `status`: running, finished, failed (`error` says why), or stopped before `max_duration`. A killed
  run leaves "running" with a dead `pid` and an old `updated`: readers take it as unfinished.
- `config`: the resolved YAML, secrets redacted. `data`: what was trained on and evaluated on;
  `counts` are documents kept, cut or dropped, and tokens cut. `documents` and `tokens` of a loader
  are those of one epoch; `fingerprint` is of tokens and labels, whatever their order.
- `tokens`: `slots` computed, filled ones included; `real`; `loss`, those with a label.
- `time`: wall seconds from the start of training to `updated`, evaluations included, and seconds of
  training steps alone; both without the time between an interruption and its resumption.
- `throughput`: of the training steps on all devices together, without each process's first step,
  which compiles; null before there is one. `fill`: real tokens over the packs' capacity.
  `waiting_for_data`: share of the time, 0 to 1; records of before 2026-11-26 do not have it. `mfu`:
  see models/flops.py; null where the device's peak is not known.
- `evaluations`: by step. Positive `learning` is more learned, positive `forgetting` more forgotten,
  both against step 0; `metrics` are raw values, those of Composer's own evaluators under
  eval/<label>/<metric>.
- `items`: the per-item file, beside the record.

Values may be NaN: a run that diverged has a record too, and JSON as Python writes it says NaN.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from foundry_ext.utils.redaction import redact

RECORD_NAME = "record.json"  # in a run's folder and among its W&B files
SCHEMA_VERSION = 1
STATUSES = ("running", "finished", "failed", "stopped")
_LONGEST_PATH = 200  # characters; file systems end at 255
LATER_KEYS = ("throughput.waiting_for_data",)  # which older records of this schema do not have
ITEM_NUMBERS = {"loss", "kl", "acc", "acc_norm", "strict_match", "flexible_extract", "tokens"}


@dataclass(frozen=True)
class MapOf:
    """A mapping with any names, whose values are all of this kind."""

    values: Any


NUMBER = (int, float)
COUNT_OR_NONE = (int, None)
NUMBER_OR_NONE = (int, float, None)
TEXT_OR_NONE = (str, None)
NUMBERS = MapOf(NUMBER)
LOADER = {
    "name": TEXT_OR_NONE,
    "revision": TEXT_OR_NONE,
    "fingerprint": TEXT_OR_NONE,
    "documents": COUNT_OR_NONE,
    "tokens": COUNT_OR_NONE,
    "counts": MapOf(int),
}
EVALUATION = {
    "step": int,
    "real_tokens": int,
    "metrics": NUMBERS,
    "learning": NUMBERS,
    "forgetting": NUMBERS,
}
# A type, a tuple of types and None, keys that must all be there, [kind of all items], MapOf(kind).
SCHEMA: dict[str, Any] = {
    "schema_version": int,
    "run_name": str,
    "status": str,
    "error": TEXT_OR_NONE,
    "started": str,
    "updated": str,
    "ended": TEXT_OR_NONE,
    "pid": int,
    "experiment": str,
    "method": str,
    "seed": int,
    "learning_rate": NUMBER,
    "config": dict,
    "environment": {
        "python": str,
        "packages": MapOf(str),
        "commit": TEXT_OR_NONE,
        "dirty": (bool, None),
        "device": str,
        "device_kind": str,
        "world_size": int,
    },
    "data": {"train": LOADER, "eval": MapOf(LOADER)},
    "model": {
        "name": str,
        "parameters": int,
        "trainable_parameters": int,
        "rank": COUNT_OR_NONE,
        "alpha": NUMBER_OR_NONE,
        "effective_scale": NUMBER_OR_NONE,
        "target_modules": (list, None),
        "init": TEXT_OR_NONE,
    },
    "steps": int,
    "documents": int,
    "tokens": {"slots": int, "real": int, "loss": int},
    "time": {"wall_seconds": NUMBER, "train_seconds": NUMBER},
    "peak_memory_bytes": COUNT_OR_NONE,
    "throughput": {
        "real_tokens_per_second": NUMBER_OR_NONE,
        "loss_tokens_per_second": NUMBER_OR_NONE,
        "fill": NUMBER_OR_NONE,
        "waiting_for_data": NUMBER_OR_NONE,
        "mfu": NUMBER_OR_NONE,
    },
    "evaluations": [EVALUATION],
    "items": TEXT_OR_NONE,
}


def now() -> str:
    """This moment as ISO 8601 in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def new_record(
    *,
    run_name: str,
    experiment: str,
    method: str,
    seed: int,
    learning_rate: float,
    config: dict[str, Any],
    environment: dict[str, Any],
    data: dict[str, Any],
    model: dict[str, Any],
    items: str | None = None,
) -> dict[str, Any]:
    """The record of a run that starts now, in this process, with nothing done yet."""
    started = now()
    return {
        "schema_version": SCHEMA_VERSION,
        "run_name": run_name,
        "status": "running",
        "error": None,
        "started": started,
        "updated": started,
        "ended": None,
        "pid": os.getpid(),
        "experiment": experiment,
        "method": method,
        "seed": seed,
        "learning_rate": learning_rate,
        "config": config,
        "environment": environment,
        "data": data,
        "model": model,
        "steps": 0,
        "documents": 0,
        "tokens": {"slots": 0, "real": 0, "loss": 0},
        "time": {"wall_seconds": 0.0, "train_seconds": 0.0},
        "peak_memory_bytes": None,
        "throughput": dict.fromkeys(SCHEMA["throughput"]),
        "evaluations": [],
        "items": items,
    }


def validate(record: Any) -> None:
    """Holds `record` against the schema.

    Raises:
        ValueError: names the first key that is wrong, missing or unknown, and what it should be.
    """
    if not isinstance(record, Mapping) or "schema_version" not in record:
        raise ValueError("no run record: schema_version is missing")
    version = record["schema_version"]
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"schema_version: {version!r}; this version of foundry_ext reads {SCHEMA_VERSION}"
        )
    _check(record, SCHEMA, "")
    unknown = sorted(set(record) - set(SCHEMA))
    if unknown:
        raise ValueError(f"{unknown[0]}: no key of a run record")
    if record["status"] not in STATUSES:
        raise ValueError(f"status: {record['status']!r} is none of {', '.join(STATUSES)}")
    items = record["items"]
    if items is not None and (PurePosixPath(items).is_absolute() or ".." in items.split("/")):
        raise ValueError(f"items: {items!r} leaves the record's folder; give a path inside it")
    if items is not None and len(items) > _LONGEST_PATH:
        raise ValueError(f"items: a path of {len(items)} characters; give a shorter one")


def _check(value: Any, kind: Any, place: str) -> None:
    if isinstance(kind, dict):
        _check(value, dict, place)
        for key, child in kind.items():
            if key in value:
                _check(value[key], child, f"{place}{key}.")
            elif f"{place}{key}" not in LATER_KEYS:
                raise ValueError(f"{place}{key}: missing from the run record")
    elif isinstance(kind, MapOf):
        _check(value, dict, place)
        for key, child in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{place}{key}: {key!r} is not a name")
            _check(child, kind.values, f"{place}{key}.")
    elif isinstance(kind, list):
        _check(value, list, place)
        for index, child in enumerate(value):
            _check(child, kind[0], f"{place}{index}.")
    else:
        kinds = kind if isinstance(kind, tuple) else (kind,)
        types = tuple(type(None) if one is None else one for one in kinds)
        # Python takes True for 1.
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            names = " or ".join("null" if one is None else one.__name__ for one in kinds)
            raise ValueError(
                f"{place.rstrip('.') or 'record'}: {value!r} is no {names}, but"
                f" {type(value).__name__}"
            )


def write_record(path: Path | str, record: dict[str, Any]) -> None:
    """Writes atomically: whoever reads `path` finds the old record or the new one, both whole.

    Secrets are redacted everywhere, not in the configuration alone.

    Raises:
        ValueError: the record is not one; nothing is written.
    """
    path, record = Path(path), redact(record)
    validate(record)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        json.dump(record, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_record(path: Path | str) -> dict[str, Any]:
    """The record at `path`.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: no record, or of another schema version; names the file and the key.
    """
    try:
        record = json.loads(Path(path).read_text())
        validate(record)
    except (ValueError, RecursionError) as error:  # json's and Unicode's are ValueErrors
        raise ValueError(f"{path}: {error}") from error
    return record


def mark_failed(path: Path | str, error: BaseException | str) -> None:
    """Turns this process's running record into a failed one; says nothing where there is none.

    Args:
        error: the exception, recorded as "Type: message", or such a text.
    """
    try:
        record = read_record(path)
    except (OSError, ValueError):
        return
    if record["status"] != "running" or record["pid"] != os.getpid():
        return
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    ended = now()
    write_record(
        path, {**record, "status": "failed", "error": text, "updated": ended, "ended": ended}
    )


def items_path(path: Path | str, record: Mapping[str, Any]) -> Path | None:
    """Where the per-item file of the record at `path` lies."""
    return None if record["items"] is None else Path(path).parent / record["items"]


def read_items(path: Path | str) -> list[dict[str, Any]]:
    """The lines of a per-item file; of two for one (step, set, item) the later one.

    A last line that a killed run left unfinished is passed over.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a line that is none; names the file and the line's number.
    """
    items: dict[tuple[Any, Any, Any], dict[str, Any]] = {}
    lines = Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            item = json.loads(line.decode())
            for key in ITEM_NUMBERS & item.keys():
                _check(item[key], (*NUMBER, bool), key)
            items[item["step"], item["set"], item["item"]] = item
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if number < len(lines):  # a finished line ends in \n, so something follows it
                raise ValueError(f"{path}, line {number}: no item ({error})") from error
    return list(items.values())
