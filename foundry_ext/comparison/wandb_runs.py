"""Records and items of W&B runs, from the folder of an offline run or from the server."""

import re
from pathlib import Path
from typing import Any

from foundry_ext.records.record import RECORD_NAME, items_path, read_record
from foundry_ext.utils.errors import UserError

_PART = r"[A-Za-z0-9_-][A-Za-z0-9_.-]*"
_ADDRESS = re.compile(rf"{_PART}/{_PART}/{_PART}")
_NO_RECORD = (
    f"this W&B run has no {RECORD_NAME}; runs with the callback run_record and the logger"
    " wandb_metrics have one once they have ended"
)


def is_online(reference: str) -> bool:
    """Return whether a reference names a run on the server, entity/project/run_id, not a path."""
    return bool(_ADDRESS.fullmatch(reference)) and not Path(reference).exists()


def is_local(folder: Path) -> bool:
    """Return whether a folder is a run's in W&B's layout: wandb/offline-run-..., wandb/run-..."""
    return folder.is_dir() and re.match(r"(offline-)?run-", folder.name) is not None


def local_record(folder: Path) -> Path:
    """Return the path of the record in a run's folder; its items are beside it.

    Raises:
        FileNotFoundError: the folder has no record.
    """
    path = folder / "files" / RECORD_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: {_NO_RECORD}")
    return path


def fetch_record(reference: str, folder: Path, *, api: Any = None) -> Path:
    """Download the record and items of a run on the server.

    Args:
        reference: entity/project/run_id, as in the run's address.
        folder: the run gets a folder of its own in it.
        api: a `wandb.Api`; by default a new one, which needs a login.

    Returns:
        The record's path; its items, if it has any, are beside it.

    Raises:
        UserError: there is no such run, no access, or no record in it.
    """
    if not _ADDRESS.fullmatch(reference):
        raise UserError(f"{reference}: not a W&B run; give entity/project/run_id")
    import wandb
    from wandb.errors import Error

    try:
        run = (api or wandb.Api()).run(reference)
        target = folder / reference.replace("/", "+")
        path = _download(run, RECORD_NAME, target)
        if path is None:
            raise UserError(f"{reference}: {_NO_RECORD}")
        record = read_record(path)  # checks that its items are inside the folder
        if items_path(path, record) is not None:
            _download(run, record["items"], target)
    except Error as error:
        raise UserError(f"{reference}: W&B says {error}") from error
    return path


def _download(run: Any, name: str, folder: Path) -> Path | None:
    """Download the run's file of this name, or return None if there is none."""
    for file in run.files(names=[name]):
        if file.name == name:
            file.download(root=str(folder), replace=True)
            return folder / name
    return None
