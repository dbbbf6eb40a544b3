"""The way out for a YAML that does not exist: its replacement, or files of a similar name."""

import difflib
import re
from pathlib import Path

from foundry_ext.config.shipped import shipped_yamls

SUFFIXES = (".yaml", ".yml")
# Earlier versions had a file per size, data set and method. Now one per method has variables.
_OLD = re.compile(r"smollm2-(135m|360m|1\.7b)_(.+)_(full|lora|dora|rslora)\.ya?ml")
_FOLDERS = {"finetune": "yamls", "pretrain": "yamls/pretrain"}


def way_out(path: Path) -> str:
    """Return `; it is now: composer train.py ...`, `, did you mean ...?` or ""."""
    return _replacement(path) or _near_files(path)


def _replacement(path: Path) -> str:
    kind = path.parent.name
    if kind not in _FOLDERS or path.parent.parent.name != "yamls":
        return ""
    folder = _FOLDERS[kind]
    old = _OLD.fullmatch(path.name)
    if old is not None:
        size, data, method = old.groups()
        return (
            f"; it is now: composer train.py {folder}/smollm2_{method}.yaml variables.size={size}"
            f" variables.data={data}"
        )
    if kind == "pretrain":
        return ""  # there are others in it
    return (
        f"; its files are now {folder}/smollm2_{{full,lora,dora,rslora}}.yaml, with"
        " variables.size=... variables.data=..."
    )


def _near_files(path: Path) -> str:
    """Name files of a similar name beside the missing one, in yamls/ or shipped."""
    beside = sorted(path.parent.iterdir()) if path.parent.is_dir() else []
    here = Path("yamls")
    shipped = here if here.is_dir() else shipped_yamls()
    found = dict.fromkeys([*beside, *sorted(shipped.rglob("*"))])
    found = [file for file in found if file.suffix in SUFFIXES]
    stems = difflib.get_close_matches(path.stem, {file.stem for file in found}, n=3, cutoff=0.6)
    near = [file for stem in stems for file in found if file.stem == stem]
    near.sort(key=lambda file: file.parts[-len(path.parts) :] != path.parts)  # the same name first
    return f", did you mean {' or '.join(map(str, near[:3]))}?" if near else ""
