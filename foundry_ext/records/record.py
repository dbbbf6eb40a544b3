"""A run's record, `outputs/<run>/record.json`: its settings, costs and curves.

records/schema.py names every key with its type, meaning and unit.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from foundry_ext.records.schema import LARGEST_COUNT, Record, Throughput
from foundry_ext.utils.atomic import write_text
from foundry_ext.utils.errors import UserError, explain_invalid, shortened
from foundry_ext.utils.json_lines import read_lines
from foundry_ext.utils.redaction import redact

RECORD_NAME = "record.json"  # in a run's folder and among its W&B files
SCHEMA_VERSION = 1
ITEM_NUMBERS = {
    *("loss", "kl", "acc", "acc_norm", "logprob", "strict_match", "flexible_extract", "tokens")
}


def now() -> str:
    """Return the current time as ISO 8601 in UTC, to the millisecond."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


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
    defaults: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the record of a run that starts now, in this process.

    The arguments are keys of the schema.
    """
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
        "defaults": defaults or {},
        "environment": environment,
        "data": data,
        "model": model,
        "checkpoint": None,
        "steps": 0,
        "documents": 0,
        "tokens": {"slots": 0, "real": 0, "loss": 0},
        "time": {"wall_seconds": 0.0, "train_seconds": 0.0},
        "peak_memory_bytes": None,
        "throughput": dict.fromkeys(Throughput.model_fields),
        "evaluations": [],
        "items": items,
    }


def validate(record: Any) -> None:
    """Check a record against the schema.

    Raises:
        UserError: names the first key that is wrong, missing or unknown, and what it must be.
    """
    if not isinstance(record, dict) or "schema_version" not in record:
        raise UserError("not a run record: schema_version is missing")
    version = record["schema_version"]
    if version != SCHEMA_VERSION:
        raise UserError(
            f"schema_version: {version!r}; this version of foundry_ext reads {SCHEMA_VERSION}"
        )
    try:
        Record.model_validate(record)
    except ValidationError as error:
        raise UserError(explain_invalid(error, Record.model_fields)) from error


def write_record(path: Path | str, record: dict[str, Any]) -> None:
    """Write a record atomically: a reader finds either the old record or the new one.

    Secrets are redacted everywhere, not only in the configuration.

    Raises:
        UserError: the record does not fit the schema; nothing is written.
    """
    record = redact(record)
    validate(record)
    write_text(Path(path), json.dumps(record, indent=1) + "\n")


def read_record(path: Path | str) -> dict[str, Any]:
    """Read and check the record at `path`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a record of this schema version; names the file and the key.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        validate(record)
    except (ValueError, RecursionError) as error:  # json's and Unicode's errors are ValueErrors
        raise UserError(f"{path}: {error}") from error
    return record


def mark_failed(path: Path | str, error: BaseException | str, *, since: str = "") -> None:
    """Mark this process's running record as failed; do nothing if there is none.

    A record that cannot be written, on a full disk, hides no error.

    Args:
        path: the record.
        error: the exception, recorded as "Type: message", or such a text.
        since: when this process's run began, as `now` writes it. A record that was last written
            before then is of an earlier process, which may have had the same number.
    """
    try:
        record = read_record(path)
    except (OSError, ValueError):
        return
    if record["status"] != "running" or record["pid"] != os.getpid():
        return
    if record["updated"] < since:
        return
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    ended = now()
    with contextlib.suppress(OSError):
        write_record(
            path, {**record, "status": "failed", "error": text, "updated": ended, "ended": ended}
        )


def items_path(path: Path | str, record: Mapping[str, Any]) -> Path | None:
    """Return the path of the per-item file that belongs to the record at `path`."""
    return None if record["items"] is None else Path(path).parent / record["items"]


def read_items(path: Path | str) -> list[dict[str, Any]]:
    """Read a per-item file; a later line replaces an earlier one of the same step, set and item.

    A last line that a killed run left unfinished is skipped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is corrupted; names the file and the line's number.
    """
    items: dict[tuple[Any, Any, Any], dict[str, Any]] = {}
    for number, item in read_lines(path, growing=True):
        try:
            for key in ITEM_NUMBERS & item.keys():
                if not isinstance(item[key], int | float) or _is_too_large(item[key]):
                    raise UserError(f"{key}: {shortened(item[key])} must be a number")
            if type(item["step"]) is not int or _is_too_large(item["step"]):
                raise UserError(f"step: {shortened(item['step'])} must be a whole number")
            items[item["step"], item["set"], item["item"]] = item
        except (UserError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}, line {number}: not an item ({error})") from error
    return list(items.values())


def _is_too_large(number: float) -> bool:
    """Return whether no table of numbers can hold an integer; a float may be infinite."""
    return isinstance(number, int) and abs(number) > LARGEST_COUNT
