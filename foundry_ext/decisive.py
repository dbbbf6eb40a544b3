"""The settings that a run's result depends on, and which of them two configurations differ in."""

from collections.abc import Mapping
from typing import Any

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
}


def find(config: Any, key: str) -> Any:
    """The value at a dotted key, or None."""
    for part in key.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config


def settings(config: Mapping[str, Any], without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Dotted key -> value of every decisive setting, those below the keys `without` left out."""
    found: dict[str, Any] = {}
    for key in DECISIVE:
        if key not in without:
            _flatten(find(config, key), key, found)
    return found


def _flatten(value: Any, key: str, found: dict[str, Any]) -> None:
    if isinstance(value, Mapping):
        for name, child in value.items():
            if name not in _HOW:
                _flatten(child, f"{key}.{name}", found)
    elif value is not None:
        found[key] = list(value) if isinstance(value, list | tuple) else value


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`optimizer.lr: 0.01, now 0.5` of each setting that differs."""
    return [
        f"{key}: {before.get(key)}, now {now.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
