"""Spelling of values as `key=value` overrides, which are read as YAML."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from foundry_ext.config.overrides import parse_value

# A number without a dot, such as 1e-4: OmegaConf reads it as one, PyYAML and W&B as a text.
EXPONENT = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
# Set by `wandb agent`: a file with the values of the run, whose texts the command line has lost.
_AGENT_FILE = "WANDB_SWEEP_PARAM_PATH"


class _Quoting(yaml.SafeDumper):
    """Writer that quotes every text, because OmegaConf takes more texts for numbers than PyYAML."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Quoting.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"')
)


def spell(value: Any) -> str:
    """Return the text that an override's reader turns into this value.

    It is Python's `str`, which `wandb agent` writes, wherever that is read as the value.

    >>> spell(1e-05), spell(["q", 2]), spell("#b")
    ('1e-05', "['q', 2]", '"#b"')
    """
    plain = str(value)
    try:
        if plain.strip() and repr(parse_value(plain)) == repr(value):
            return plain
    except ValueError:
        pass
    text = yaml.dump(
        value, Dumper=_Quoting, default_flow_style=True, sort_keys=False, width=float("inf")
    )
    return text.removesuffix("\n").removesuffix("\n...")


def as_in_the_sweep(overrides: Sequence[str]) -> list[str]:
    """Return the overrides of a run of `wandb agent` with the values that its sweep file has.

    The agent writes `key=a: b` for the text 'a: b'; read as YAML, this is a mapping. A text such as
    1e-4 stays a number: W&B cannot tell whether the sweep file has it in quotes.
    """
    path = Path(os.environ.get(_AGENT_FILE, ""))
    if not path.is_file():
        return list(overrides)
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return list(overrides)
    values = {
        f"{key}={entry['value']}": f"{key}={spell(entry['value'])}"
        for key, entry in (entries.items() if isinstance(entries, dict) else ())
        if isinstance(entry, dict) and entry.get("value") is not None
        if not (isinstance(entry["value"], str) and EXPONENT.fullmatch(entry["value"]))
    }
    return [values.get(override, override) for override in overrides]
