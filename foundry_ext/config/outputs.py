"""Names and places of the files that a run writes."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foundry_ext.utils.nested import get
from foundry_ext.utils.redaction import redact

SAVE_FOLDER = "save_folder"
RECORD = "callbacks.run_record.path"
EXPORT = "callbacks.hf_export.folder"
ITEMS = "callbacks.forgetting.items"
METRICS = "loggers.metrics_file.path"
OUTPUT_KEYS = (SAVE_FOLDER, RECORD, EXPORT, ITEMS, METRICS)
_LONGEST_NAME = 200  # bytes; logs and checkpoints add to it, file systems end at 255


def output_paths(config: Mapping[str, Any]) -> dict[str, Path]:
    """Return {key: path} of the files and folders that a run writes on this machine's disks.

    `{run_name}` is filled in. A path that waits for a name that Composer makes up is left out.

    Args:
        config: the resolved configuration.
    """
    name = config.get("run_name")
    paths = {}
    for key in OUTPUT_KEYS:
        place = get(config, key)
        if not isinstance(place, str) or not place or "://" in place:
            continue
        if name is not None:
            place = place.replace("{run_name}", str(name))
        if "{run_name}" not in place:
            paths[key] = Path(place)
    return paths


def find_output_fault(config: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the run's name or with the places it writes to, or None.

    Args:
        config: the resolved configuration.
    """
    name = config.get("run_name")
    fault = None if name is None else find_name_fault(str(name))
    if fault:
        return f"run_name, {str(name)!r}, {fault}"
    return find_clash(output_paths(config))


def find_name_fault(name: str) -> str | None:
    """Return why `name` cannot be the name of a run, and so of its folder, or None."""
    way_out = "give one such as lora-seed_17"
    if not name.strip():
        return f"is empty; {way_out}"
    if name in (".", "..") or re.search(r"[/\\]", name):
        return f"is no file's name; {way_out}, and say in save_folder and the paths where to write"
    if not name.isprintable() or re.search(r"[{}]", name):
        return f"holds control characters or braces; {way_out}"
    if redact(name) != name:
        return f"looks like a secret, so records would say {redact(name)!r}; {way_out}"
    if len(os.fsencode(name)) > _LONGEST_NAME:
        return f"is longer than {_LONGEST_NAME} bytes; shorten it"
    return None


def find_clash(paths: Mapping[str, Path]) -> str | None:
    """Return two of one run's outputs of which one would overwrite the other, or None.

    The export's folder is replaced as a whole, so nothing else may lie in it.
    """
    places = {key: Path(os.path.abspath(path)) for key, path in paths.items()}
    for key, place in places.items():
        for other, where in places.items():
            inside = key == EXPORT and where.is_relative_to(place)
            if other != key and (where == place or inside):
                return (
                    f"{other}, {str(paths[other])!r}, is {'' if where == place else 'inside '}"
                    f"{key}, {str(paths[key])!r}, which would overwrite it; give each a place of"
                    " its own"
                )
    return None


def find_shared(
    runs: Mapping[str, Mapping[str, Any]],
) -> tuple[str, str, str, str] | None:
    """Return (a run, its key, the path, another run) that write to one place, or None.

    Args:
        runs: {what to call the run: its resolved configuration}.
    """
    owners: dict[str, str] = {}
    for run, config in runs.items():
        for key, path in output_paths(config).items():
            owner = owners.setdefault(os.path.abspath(path), run)
            if owner != run:
                return run, key, str(path), owner
    return None
