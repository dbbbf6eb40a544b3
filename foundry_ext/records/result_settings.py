"""The settings that a run's result depends on, and a comparison of two runs' settings.

Every setting decides the result unless `EFFECTS` says otherwise. A test walks all keys and asks for
an entry.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from enum import Enum
from functools import cache
from typing import Any, NamedTuple

from foundry_ext.utils.absent import run_settings
from foundry_ext.utils.nested import leaves
from foundry_ext.utils.redaction import REDACTED, is_secret_name, redact


class Effect(Enum):
    """The effect of a setting on the result of a run that changes it when it resumes."""

    DECIDES = "another result"
    CONTENT = "judged by the content that it leads to"
    SAME_BITS = "the same bits"
    ROUNDING = "equal to rounding"
    ANNOUNCED = "allowed and announced"


_LOADERS = ("train_loader", "eval_loader", "callbacks.forgetting.sets.*.loader")
# Keys of a loader that change how it reads, not what.
_READING = (
    *("num_workers", "persistent_workers", "pin_memory", "prefetch_factor", "timeout"),
    *("dataset.download_retry", "dataset.download_timeout", "dataset.validate_hash"),
    *("dataset.keep_zip", "dataset.cache_limit", "dataset.allow_unsafe_types"),
    # Knobs of padding, without effect on packs.
    *("dataset.decoder_only_format", "dataset.allow_pad_trimming", "dataset.pad_to_longest"),
)
# Callbacks and loggers that only watch, save or speak. Any other one may change anything.
_WATCHING = (
    *("run_record", "packed_throughput", "text_samples", "hf_export", "exact_resume"),
    *("env_logging", "fdiff_metrics", "hf_checkpointer", "lr_monitor", "mbmoe_tok_per_expert"),
    *("memory_monitor", "memory_snapshot", "mono_checkpoint_saver", "nan_monitor", "oom_observer"),
    *("optimizer_monitor", "run_timeout", "runtime_estimator", "scheduled_gc", "speed_monitor"),
    "system_metrics_monitor",
)
_LOGGERS = (
    *("metrics_file", "wandb_metrics", "in_memory_logger", "inmemory", "mlflow", "mosaicml"),
    *("tensorboard", "wandb"),
)

# Dotted key -> effect of it and all keys below it; `*` is any one name. The longest key counts.
_TABLE: dict[Effect, tuple[str, ...]] = {
    Effect.DECIDES: (
        *("accumulate_train_batch_on_tokens", "algorithms", "callbacks", "code_paths"),
        *("compile_config", "eval_gauntlet", "eval_subset_num_batches"),
        *("global_train_batch_size", "icl_seq_len", "icl_subset_num_batches", "icl_tasks"),
        *("load_ignore_keys", "load_path", "load_strict_model_weights", "load_weights_only"),
        *("loggers", "max_seq_len", "model", "optimizer", "precision", "scheduler", "seed"),
        *("spin_dataloaders", "train_loader", "train_subset_num_batches", "eval_loader.*"),
        *("fsdp_config.mixed_precision", "callbacks.forgetting", "train_loader.dataset.eval_packs"),
        *(f"{loader}.{key}" for loader in _LOADERS for key in ("name", "drop_last")),
    ),
    Effect.CONTENT: (
        "tokenizer",
        "callbacks.forgetting.sets.*.path",
        *(f"{loader}.dataset" for loader in _LOADERS),
    ),
    Effect.SAME_BITS: (
        *("autoresume", "console_log_interval", "cuda_load_lazy", "device_train_batch_size"),
        *("device_train_grad_accum", "dist_timeout", "expandable_segments", "flatten_metadata"),
        *("log_config", "log_to_console", "max_split_size_mb", "metadata"),
        *("only_composer_checkpoint", "only_hf_checkpoint", "profiler", "progress_bar"),
        *("python_log_level", "run_name", "save_filename", "save_folder", "save_ignore_keys"),
        *("save_interval", "save_latest_filename", "save_num_checkpoints_to_keep"),
        *("save_overwrite", "save_weights_only", "variables"),
        *("callbacks.forgetting.items", "model.should_save_peft_only", "model.use_auth_token"),
        *(f"callbacks.{name}" for name in _WATCHING),
        *(f"loggers.{name}" for name in _LOGGERS),
        *(f"{loader}.{key}" for loader in _LOADERS for key in _READING),
    ),
    Effect.ROUNDING: (
        *("device_eval_batch_size", "device_train_microbatch_size", "n_gpus"),
        *("fsdp_config", "tp_config"),  # None on one rank
        *("model.activation_checkpointing", "model.attention_backend", "model.compile"),
        *("model.compile_mode", "model.init_device", "model.loss"),
        *(f"{loader}.dataset.fixed_shape" for loader in _LOADERS),
        *(f"{loader}.dataset.eval_packs" for loader in _LOADERS[1:]),
    ),
    Effect.ANNOUNCED: (
        *("callbacks.guard", "eval_first", "eval_interval", "eval_loader", "max_duration"),
    ),
}
EFFECTS = {key: effect for effect, keys in _TABLE.items() for key in keys}

# Where training starts; without effect on a checkpoint that is resumed.
START_KEYS = ("load_path", "load_weights_only", "load_strict_model_weights", "load_ignore_keys")
_COMPONENTS = ("algorithms", "callbacks", "loggers")  # {name: settings}; an empty one counts too
# Sections that a run has or lacks as a whole. `[...]` is the label of one of several loaders.
_OPTIONAL = re.compile(r"(fsdp_config|tp_config|eval_loader(\[[^]]*\])?)(?![^.])")
# llm-foundry moves a value of another type to a key of its own.
_MOVED = {
    "eval_loaders": "eval_loader",
    "eval_gauntlet_str": "eval_gauntlet",
    "icl_tasks_str": "icl_tasks",
}
# The settings that checkpoints held before they held all.
_FIRST_FORMAT = re.compile(
    r"(seed|max_seq_len|model|optimizer|scheduler|algorithms|global_train_batch_size|precision"
    r"|callbacks\.forgetting\.sets)(\..*)?"
)
_NUMBER = r"[0-9]+(?:_[0-9]+)*(?:\.[0-9]*)?(?:e[+-]?[0-9]+)?"
_TIME = re.compile(rf"\s*({_NUMBER})\s*(ep|ba|sp|tok|dur|iter|sec)\s*", re.IGNORECASE | re.ASCII)
_TIME_KEYS = re.compile(r"max_duration|(eval|save)_interval|scheduler\.t_.*")


class Saved(NamedTuple):
    """A run's settings, as a checkpoint or a record holds them."""

    given: Mapping[str, tuple[str, Any]]
    """Dotted key -> (digest, redacted value) of what the YAML says."""
    defaults: Mapping[str, Any] | None
    """Dotted key -> value of what it leaves out, by the version that wrote this; None: unknown."""


class Change(NamedTuple):
    """A setting that differs; None stands for a key that the YAML leaves out."""

    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.before}, now {self.now}"


def effect_of(key: str) -> Effect:
    """Return the effect of a dotted key."""
    key = re.sub(r"^eval_loader\[[^]]*\]", "eval_loader", key)
    found = [entry for entry in EFFECTS if _pattern(entry).fullmatch(key)]
    # At equal length a name is more exact than `*`.
    longest = max(found, key=lambda entry: (entry.count("."), -entry.count("*")), default=None)
    return Effect.DECIDES if longest is None else EFFECTS[longest]


@cache
def _pattern(entry: str) -> re.Pattern[str]:
    text = re.escape(entry).replace(r"\*", r"[^.]+")
    return re.compile(text if entry == "eval_loader" else rf"{text}(\..*)?", re.DOTALL)


def result_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted key -> value of every setting of a resolved YAML, secrets left out.

    Each algorithm, callback and logger has a key of its own too, since it may have no settings.
    """
    config = run_settings({_MOVED.get(key, key): value for key, value in config.items()})
    return {
        key: list(value) if isinstance(value, tuple) else value
        for section in config
        for key, value in _section(section, config[section])
    }


def _section(name: str, content: Any) -> Iterator[tuple[str, Any]]:
    if name in _COMPONENTS and isinstance(content, Mapping):
        for component, settings in content.items():
            yield f"{name}.{component}", "present"
            if settings:
                yield from leaves(settings, f"{name}.{component}", skip=is_secret_name)
    elif name == "eval_loader" and isinstance(content, list):
        for loader in content:
            label = loader.get("label") if isinstance(loader, Mapping) else None
            yield from leaves(loader, f"{name}[{label}]", skip=is_secret_name)
    elif not is_secret_name(name):
        yield from leaves(content, name, skip=is_secret_name)


def digest_settings(settings: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Return key -> (digest, redacted value), which may be written to a file.

    Runs are compared by digest, because redaction also depends on the environment.
    """
    return {key: (_digest(value), redact(value)) for key, value in settings.items()}


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def find_changes(before: Saved, now: Saved) -> list[Change]:
    """Return the settings that differ, by key.

    A key that only one side has is a difference, unless its value is the default of the version
    that wrote the other side. A checkpoint of the first format says nothing about most keys.
    """
    keys = before.given.keys() | now.given.keys() | (before.defaults or {}).keys()
    if before.defaults is None:
        keys = {key for key in keys if _in_first_format(key)}
    changes = []
    for key in sorted(keys):
        values = _look_up(key, before, now), _look_up(key, now, before)
        if not equal(key, *values):
            shown = [side.given.get(key, ("", None))[1] for side in (before, now)]
            # Neither side says it, so the defaults of two versions differ.
            shown = [value for _, value in values] if shown == [None, None] else shown
            changes.append(Change(key, *shown))
    return _by_section(changes, before, now)


def _in_first_format(key: str) -> bool:
    is_name = key.count(".") == 1 and key.startswith(tuple(f"{name}." for name in _COMPONENTS))
    decides = effect_of(key) in (Effect.DECIDES, Effect.CONTENT)
    return decides and not is_name and _FIRST_FORMAT.fullmatch(key) is not None


def _look_up(key: str, side: Saved, other: Saved) -> tuple[str, Any]:
    if key in side.given:
        return side.given[key]
    for defaults in (side.defaults, other.defaults):
        if defaults is not None and key in defaults:
            return _digest(defaults[key]), defaults[key]
    return _digest(None), None


def _by_section(changes: list[Change], before: Saved, now: Saved) -> list[Change]:
    """Return one change for an optional section that one side lacks, and none for its keys.

    A component that comes or goes is named by its settings, or by its name if it has none.
    """
    found: dict[str, Change] = {}
    for change in changes:
        section = _OPTIONAL.match(change.key)
        if section and not (_has(before, section[0]) and _has(now, section[0])):
            ends = ("given" if _has(side, section[0]) else None for side in (before, now))
            found.setdefault(section[0], Change(section[0], *ends))
        elif not any(other.key.startswith(f"{change.key}.") for other in changes):
            found[change.key] = change
    return list(found.values())


def _has(side: Saved, section: str) -> bool:
    return any(
        value is not None and key.startswith(f"{section}.")
        for key, (_, value) in side.given.items()
    )


def equal(key: str, before: tuple[str, Any], now: tuple[str, Any]) -> bool:
    """Return whether two values of `key`, (digest, redacted value), are the same setting.

    0 and 0.0 are, and so are [0.9] and (0.9,), `2ep` and `2 ep`; 1 and true are not.
    """
    if before[0] == now[0]:
        return True
    texts = [_canonical(key, value) for _, value in (before, now)]
    return texts[0] == texts[1] and REDACTED not in texts[0]


def _canonical(key: str, value: Any) -> str:
    value = _normal(value)
    if isinstance(value, float) and _TIME_KEYS.fullmatch(key):
        value = f"{value!r}ep"  # Composer's unit of a number
    if key.endswith("peft_config.target_modules") and isinstance(value, list):
        value = sorted(value, key=str)
    return json.dumps(value, sort_keys=True, default=str)


def _normal(value: Any) -> Any:
    if isinstance(value, Mapping):
        children = {str(name): _normal(child) for name, child in value.items()}
        return {name: child for name, child in children.items() if child is not None} or None
    if isinstance(value, list | tuple):
        return [_normal(child) for child in value]
    if isinstance(value, str):
        time = _TIME.fullmatch(value)
        return f"{float(time[1])!r}{time[2].lower()}" if time else value
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) <= 2**53:
        return float(value)
    return value
