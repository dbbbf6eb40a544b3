"""Records of finished runs that are kept outside `outputs`, in a repository for example.

`FOLDER/<run>/` holds the run's record and its items, without what the model wrote. A sweep that is
given the folder copies every finished run into it and takes the runs in it as finished. Another
machine, which has the folder but not the outputs, therefore continues the sweep.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foundry_ext.records.record import RECORD_NAME, items_path, read_items
from foundry_ext.sweeps.plan import PlannedRun, finished_otherwise
from foundry_ext.sweeps.state import read_run_record
from foundry_ext.utils.atomic import write_text
from foundry_ext.utils.errors import UserError


def with_kept(runs: Sequence[PlannedRun], folder: Path) -> list[PlannedRun]:
    """Return the runs; one that is finished in `folder` only has its record there.

    Raises:
        UserError: a kept run of the same name had other settings; names the first one.
    """
    return [_with_kept(run, kept_record(run, folder)) for run in runs]


def _with_kept(run: PlannedRun, path: Path) -> PlannedRun:
    record = read_run_record(path)
    if not _is_finished(record):
        return run
    difference = finished_otherwise(run, record)
    if difference:
        raise UserError(
            f"{path} is of a finished run with {difference}; move it away, or give the YAML another"
            " run_name"
        )
    is_here = _is_finished(read_run_record(run.record))
    return run if is_here else dataclasses.replace(run, record=path)


def _is_finished(record: Mapping[str, Any]) -> bool:
    return record.get("status") == "finished"


def kept_record(run: PlannedRun, folder: Path) -> Path:
    return folder / run.name / RECORD_NAME


def keep(run: PlannedRun, folder: Path) -> None:
    """Copy a finished run's record and items into `folder`, unless a finished one is there.

    Items keep their names and numbers. Texts, such as an answer that the model generated, are left
    out. The record is written last, so that a kept run is complete.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: the items are corrupted.
    """
    path = kept_record(run, folder)
    if path == run.record or _is_finished(read_run_record(path)):
        return
    text = run.record.read_text(encoding="utf-8")
    record = json.loads(text)
    items = items_path(run.record, record) if record.get("items") else None
    if items is not None:
        lines = [json.dumps(_without_texts(item)) + "\n" for item in read_items(items)]
        write_text(path.parent / record["items"], "".join(lines))
    write_text(path, text)


def _without_texts(item: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in item.items()
        if key in ("set", "item") or not isinstance(value, str)
    }
