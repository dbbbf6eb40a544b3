"""Records and items of W&B runs: in the folder of an offline run, or on the server."""

import re
from pathlib import Path
from typing import Any

from foundry_ext.records.record import RECORD_NAME, items_path, read_record

_PART = r"[A-Za-z0-9_-][A-Za-z0-9_.-]*"


def is_online(reference: str) -> bool:
    """Whether this is a run on the server, entity/project/run_id, and nothing on this disk."""
    return bool(re.fullmatch(rf"{_PART}/{_PART}/{_PART}", reference)) and not (
        Path(reference).exists()
    )


def is_local(folder: Path) -> bool:
    """Whether this is a run's folder as W&B lays it out: wandb/offline-run-..., wandb/run-..."""
    return folder.is_dir() and re.match(r"(offline-)?run-", folder.name) is not None


def local_record(folder: Path) -> Path:
    """The record in a run's folder; its items lie beside it.

    Raises:
        FileNotFoundError: there is none.
    """
    path = folder / "files" / RECORD_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: this W&B run has no {RECORD_NAME}; runs with the callback run_record and"
            " the logger wandb_metrics have one once they have ended"
        )
    return path


def fetch_record(reference: str, folder: Path, *, api: Any = None) -> Path:
    """Downloads record and items of a run on the server.

    Args:
        reference: entity/project/run_id, as in the run's address.
        folder: where to; the run gets a folder in it.
        api: a `wandb.Api`; made here if not given, which needs a login.

    Returns:
        The record's path; its items, if it has any, lie beside it.

    Raises:
        ValueError: no such run, no access, or no record in it.
    """
    if not re.fullmatch(rf"{_PART}/{_PART}/{_PART}", reference):
        raise ValueError(f"{reference}: no W&B run; give entity/project/run_id")
    from wandb.errors import Error

    import wandb

    try:
        run = (api or wandb.Api()).run(reference)
        target = folder / reference.replace("/", "+")
        path = _download(run, RECORD_NAME, target)
        if path is None:
            raise ValueError(
                f"{reference}: this W&B run has no {RECORD_NAME}; runs with the callback run_record"
                " and the logger wandb_metrics have one once they have ended"
            )
        record = read_record(path)  # checked: the name of its items leaves no folder
        if items_path(path, record) is not None:
            _download(run, record["items"], target)
    except Error as error:
        raise ValueError(f"{reference}: W&B says {error}") from error
    return path


def _download(run: Any, name: str, folder: Path) -> Path | None:
    """The run's file of this name, or None where it has none."""
    for file in run.files(names=[name]):
        if file.name == name:
            file.download(root=str(folder), replace=True)
            return folder / name
    return None
