"""The training that weights come from: the record of their run, and their step in it."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foundry_ext.checkpoints.safe_load import load_checkpoint
from foundry_ext.records.record import read_record
from foundry_ext.utils.errors import UserError, one_line
from foundry_ext.utils.nested import get

log = logging.getLogger(__name__)

EXPORT_MARK = ".hf_export"
"""File that marks the folders of the `hf_export` callback and lists what it wrote."""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """The training that weights come from, as far as it is known."""

    record: Mapping[str, Any] | None = None
    """Record of the run, which may still be running."""
    step: int | None = None
    """Optimizer steps that the weights have behind them."""
    real_tokens: int | None = None
    """Real tokens trained on in these steps."""


def record_above(path: Path) -> Path | None:
    """Return the record of the run whose folder holds `path`, at most one level down, or None."""
    folder = path.resolve()
    candidates = (parent / "record.json" for parent in (folder, *folder.parents[:2]))
    return next((record for record in candidates if record.is_file()), None)


def provenance_of(path: Path) -> Provenance:
    """Return the provenance of a Hugging Face folder or of a Composer checkpoint."""
    if not path.is_dir():
        return provenance_of_state(path, load_checkpoint(path, mmap=True)["state"])
    record = _read_record(path)
    if record is None:
        return Provenance()
    # Only the run's own export has the weights of its last step. Others may be of any step.
    is_export = get(record["config"], "callbacks.hf_export.folder") is not None
    if not is_export or record["status"] != "finished" or not (path / EXPORT_MARK).is_file():
        return Provenance(record=record)
    tokens = record["tokens"]["real"]
    return Provenance(record=record, step=record["steps"], real_tokens=tokens)


def provenance_of_state(checkpoint: Path, state: Mapping[str, Any]) -> Provenance:
    """Return the provenance of a checkpoint with this content; its record lies above it.

    A record of another run, or of an earlier start under the same name, is not taken.
    """
    clock = get(state, "timestamp.Timestamp") or {}
    step, tokens = clock.get("batch"), clock.get("token")
    record = _read_record(checkpoint)
    if record is not None:
        started = get(state, "callbacks.RunRecord.started")
        is_start = started in (None, record["started"])  # an old checkpoint does not say
        if state.get("run_name") != record["run_name"] or not is_start:
            log.warning("the record beside %s is of another run, and is not used", checkpoint)
            record = None
    return Provenance(record=record, step=step, real_tokens=tokens)


def _read_record(path: Path) -> dict[str, Any] | None:
    found = record_above(path)
    try:
        return None if found is None else read_record(found)
    except (OSError, UserError) as error:  # it is not what the caller came for
        log.warning("the run's record is not used: %s", one_line(error))
        return None
