"""Names in the files of a run, and those of an earlier version in yesterday/names.json."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from foundry_ext.checkpoints.safe_load import load_checkpoint

YESTERDAY = Path(__file__).with_name("yesterday")
NAMES: dict[str, Any] = json.loads((YESTERDAY / "names.json").read_text())


def gone(kind: str, now: Iterable[str], of: str | None = None) -> set[str]:
    """Return the names of yesterday that are missing now; new ones may have come."""
    known = NAMES[kind] if of is None else NAMES[kind][of]
    assert known
    return set(known) - set(now)


def keys(value: Any, above: str = "") -> Iterator[str]:
    """Yield the dotted keys of nested mappings, with `[]` for the items of a list."""
    if isinstance(value, Mapping) and value:
        for name, child in value.items():
            yield from keys(child, f"{above}.{name}" if above else str(name))
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        for child in value:
            yield from keys(child, f"{above}[]")
    else:
        yield above


def checkpoint_keys(path: Path) -> list[str]:
    """Return the keys by which Composer finds each part's state, class names among them."""
    state = load_checkpoint(path)["state"]
    parts = {
        "callbacks": dict(state["callbacks"]),
        "algorithms": dict(state["algorithms"]),
        "schedulers": dict.fromkeys(state["schedulers"]),
        "dataset_state": state["dataset_state"],
        "huggingface": dict.fromkeys(state["integrations"]["huggingface"]["model"]),
        "optimizers": {
            name: {
                "state": {key: None for kept in optimizer["state"].values() for key in kept},
                "param_groups": [dict.fromkeys(group) for group in optimizer["param_groups"]],
            }
            for name, optimizer in state["optimizers"].items()
        },
    }
    return sorted(set(keys(parts)))


def record_keys(record: Mapping[str, Any]) -> list[str]:
    """Return a record's keys, without those that a YAML or a machine decides."""
    environment = {**record["environment"], "packages": None}
    return sorted(set(keys({**record, "config": None, "environment": environment})))


def item_keys(lines: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the keys in the lines of each set."""
    found: dict[str, set[str]] = {}
    for line in lines:
        found.setdefault(line["set"], set()).update(line)
    return {name: sorted(names) for name, names in found.items()}


def metric_keys(lines: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the keys in any of the lines."""
    return sorted({name for line in lines for name in line})


def sweep_keys(state: Mapping[str, Any]) -> list[str]:
    """Return the keys of a sweep's state and of its runs, whatever their names."""
    return sorted(set(keys({**state, "runs": list(state["runs"].values())})))


def options(text: str) -> set[str]:
    """Return the options that a command's help names."""
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
