"""The settings that a run's result depends on, and which of them two configurations differ in."""

import hashlib
from collections.abc import Mapping
from typing import Any

from foundry_ext.utils.absent import run_settings
from foundry_ext.utils.redaction import is_secret_name, redact

# Sections of a YAML.
DECISIVE = (
    *("seed", "max_seq_len", "model", "tokenizer", "train_loader.dataset", "optimizer"),
    *("scheduler", "algorithms", "max_duration", "global_train_batch_size", "precision"),
    *("eval_interval", "callbacks.forgetting.sets"),
)
# How something is computed, on what machine: to rounding, the result is the same.
_HOW = {
    *("activation_checkpointing", "attention_backend", "compile", "init_device", "loss"),
    *("num_workers", "persistent_workers", "pin_memory", "prefetch_factor", "timeout"),
    "eval_packs",
}


def find(config: Any, key: str) -> Any:
    """The value at a dotted key, or None."""
    for part in key.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config


def settings(config: Mapping[str, Any], without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Dotted key -> value of every decisive setting, those below the keys `without` left out."""
    config = run_settings(config)
    found: dict[str, Any] = {}
    for key in DECISIVE:
        if key not in without:
            _flatten(find(config, key), key, found)
    return found


def _flatten(value: Any, key: str, found: dict[str, Any]) -> None:
    if isinstance(value, Mapping):
        for name, child in value.items():
            if name not in _HOW and not is_secret_name(str(name)):
                _flatten(child, f"{key}.{name}", found)
    elif value is not None:
        found[key] = list(value) if isinstance(value, list | tuple) else value


def digests(settings: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """key -> (digest, value without secrets): what may be written down, and is compared as it was.

    What is taken for a secret depends on the environment too.
    """
    return {
        key: (hashlib.sha256(repr(value).encode()).hexdigest()[:16], redact(value))
        for key, value in settings.items()
    }


def changes(before: Mapping[str, tuple[str, Any]], now: Mapping[str, tuple[str, Any]]) -> list[str]:
    """`optimizer.lr: 0.01, now 0.5` of each setting that differs."""
    none = ("", None)
    return [
        f"{key}: {before.get(key, none)[1]}, now {now.get(key, none)[1]}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key, none)[0] != now.get(key, none)[0]
    ]
