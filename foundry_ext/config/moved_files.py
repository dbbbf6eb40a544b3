"""YAMLs that earlier versions had, and what has taken their place."""

import re
from pathlib import Path

# One file per size, data set and method; now variables of one file per method choose size and data.
_OLD = re.compile(r"smollm2-(135m|360m|1\.7b)_(.+)_(full|lora|dora|rslora)\.ya?ml")
_FOLDERS = {"finetune": "yamls", "pretrain": "yamls/pretrain"}


def replacement(path: Path) -> str:
    """Return `; it is now: composer train.py ...` for a file that is gone, or ""."""
    kind = path.parent.name
    if kind not in _FOLDERS or path.parent.parent.name != "yamls":
        return ""
    folder = _FOLDERS[kind]
    old = _OLD.fullmatch(path.name)
    if old is None:
        return (
            f"; its files are now {folder}/smollm2_{{full,lora,dora,rslora}}.yaml, with"
            " variables.size=... variables.data=..."
        )
    size, data, method = old.groups()
    return (
        f"; it is now: composer train.py {folder}/smollm2_{method}.yaml variables.size={size}"
        f" variables.data={data}"
    )
