"""The settings that a run's result depends on, and a comparison of two runs' settings."""

import hashlib
from collections.abc import Mapping
from typing import Any

from foundry_ext.utils.absent import run_settings
from foundry_ext.utils.nested import get, leaves
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


def result_settings(config: Mapping[str, Any], without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return dotted key -> value of every setting that the result depends on.

    Args:
        config: a resolved YAML.
        without: sections of RESULT_SETTINGS to leave out.
    """
    config = run_settings(config)

    def is_left_out(name: str) -> bool:
        return name in _ROUNDING_ONLY or is_secret_name(name)

    return {
        key: list(value) if isinstance(value, tuple) else value
        for section in RESULT_SETTINGS
        if section not in without
        for key, value in leaves(get(config, section), section, skip=is_left_out)
        if value is not None
    }


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
