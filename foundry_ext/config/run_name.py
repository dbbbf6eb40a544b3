"""Names of a sweep's runs: the YAML's run_name and the settings that the sweep varies.

`wandb agent` starts every run of a sweep with the same YAML and different overrides. With the
YAML's own run_name all of them would share a folder. Under a sweep the name therefore contains the
overrides: run_name lora with seed=17 variables.learning_rate=low becomes
lora-seed_17-learning_rate_low.
"""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from foundry_ext.utils.nested import leaves

# Set by `wandb agent` and by `foundry-ext sweep`.
SWEEP_VARIABLES = ("WANDB_SWEEP_ID", "FOUNDRY_EXT_SWEEP")
LONGEST = 100
"""Characters; loggers and checkpoints add to it, file systems allow 255."""


def under_sweep() -> bool:
    """Return whether `wandb agent` or `foundry-ext sweep` started this process."""
    return any(os.environ.get(name) for name in SWEEP_VARIABLES)


def sweep_run_name(base: str, settings: Mapping[str, Any]) -> str:
    """Return `base` and the settings {dotted key: value}, sorted by key; safe as a file name.

    Different settings give different names: if characters were replaced or cut, a hash of the full
    name is appended.
    """
    flat = sorted(pair for key, value in settings.items() for pair in leaves(value, key))
    if not flat:
        return base
    shown = _shortest([key for key, _ in flat])
    name = "-".join([base, *(f"{key}_{_text(v)}" for key, (_, v) in zip(shown, flat, strict=True))])
    safe = re.sub(r"[^A-Za-z0-9._+-]+", "_", name)
    if safe == name and len(name) <= LONGEST:
        return name
    whole = repr([base, *((key, _text(value)) for key, value in flat)])
    digest = hashlib.sha256(whole.encode()).hexdigest()[:8]
    return f"{safe[: LONGEST - len(digest) - 1]}-{digest}"


def _shortest(keys: Sequence[str]) -> list[str]:
    """Cut each dotted key to its last parts, as many as distinguish it from the others."""
    found = []
    for key in keys:
        parts = key.split(".")
        depth = 1
        while depth < len(parts) and any(
            other != key and other.split(".")[-depth:] == parts[-depth:] for other in keys
        ):
            depth += 1
        found.append(".".join(parts[-depth:]))
    return found


def _text(value: Any) -> str:
    """Return one spelling of a number: 3 for 3.0, 0.0001 for 1e-4."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    return str(value)
