"""The settings that a run's result depends on, and a comparison of two runs' settings."""

import hashlib
from collections.abc import Mapping
from typing import Any

from foundry_ext.utils.absent import run_settings
from foundry_ext.utils.redaction import is_secret_name, redact

# Sections of a YAML.
RESULT_SETTINGS = (
    *("seed", "max_seq_len", "model", "tokenizer", "train_loader.dataset", "optimizer"),
    *("scheduler", "algorithms", "max_duration", "global_train_batch_size", "precision"),
    *("eval_interval", "callbacks.forgetting.sets"),
)
# Keys below them that change how or where a result is computed, and the result by rounding only.
_ROUNDING_ONLY = {
    *("activation_checkpointing", "attention_backend", "compile", "init_device", "loss"),
    *("num_workers", "persistent_workers", "pin_memory", "prefetch_factor", "timeout"),
    "eval_packs",
}


def value_at(config: Any, key: str) -> Any:
    """Return the value at a dotted key, or None."""
    for part in key.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config


def result_settings(config: Mapping[str, Any], without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return dotted key -> value of every setting that the result depends on.

    Args:
        config: a resolved YAML.
        without: sections of RESULT_SETTINGS to leave out.
    """
    config = run_settings(config)
    settings: dict[str, Any] = {}
    for key in RESULT_SETTINGS:
        if key not in without:
            _flatten(value_at(config, key), key, settings)
    return settings


def _flatten(value: Any, key: str, settings: dict[str, Any]) -> None:
    if isinstance(value, Mapping):
        for name, child in value.items():
            if name not in _ROUNDING_ONLY and not is_secret_name(str(name)):
                _flatten(child, f"{key}.{name}", settings)
    elif value is not None:
        settings[key] = list(value) if isinstance(value, list | tuple) else value


def digest_settings(settings: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Return key -> (digest, redacted value), which may be written to a file.

    Runs are compared by digest, because redaction also depends on the environment.
    """
    return {
        key: (hashlib.sha256(repr(value).encode()).hexdigest()[:16], redact(value))
        for key, value in settings.items()
    }


def describe_changes(
    before: Mapping[str, tuple[str, Any]], now: Mapping[str, tuple[str, Any]]
) -> list[str]:
    """Return `optimizer.lr: 0.01, now 0.5` for each setting that differs."""
    none = ("", None)
    return [
        f"{key}: {before.get(key, none)[1]}, now {now.get(key, none)[1]}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key, none)[0] != now.get(key, none)[0]
    ]
