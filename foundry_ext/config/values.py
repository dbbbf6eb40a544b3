"""Validates YAML values before the slow imports."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from foundry_ext.config import times
from foundry_ext.utils.nested import get, leaves
from foundry_ext.utils.redaction import is_secret_name, redact

# Beyond the upper bounds memory runs out before an error can be shown.
_WHOLE = {
    "max_seq_len": (2, 2**24),
    "global_train_batch_size": (1, 2**20),
    "device_train_microbatch_size": (1, 2**20),
    "device_eval_batch_size": (1, 2**20),
    "seed": (0, 2**32 - 1),
    "train_loader.num_workers": (0, 1024),
    "eval_loader.num_workers": (0, 1024),
}
_SECTIONS = ("model", "tokenizer", "optimizer", "scheduler", "train_loader", "train_loader.dataset")
_PRECISIONS = ("fp32", "amp_fp16", "amp_bf16", "amp_fp8")  # Composer's
_TIMES = (
    *("max_duration", "eval_interval", "save_interval", "console_log_interval"),
    *(f"scheduler.{key}" for key in ("t_warmup", "t_max", "t_scale", "t_cooldown")),
    *("callbacks.hf_checkpointer.save_interval", "callbacks.generate_callback.interval"),
    *("callbacks.memory_snapshot.interval", "callbacks.async_eval.interval"),
)
_FROM_0 = "a number from 0 on"
# Key, of the sections below, -> whether a number is allowed, and what it must be.
_OPTIMIZER = {
    "lr": (lambda x: x >= 0, f"{_FROM_0}, such as 1.0e-4"),
    "weight_decay": (lambda x: x >= 0, _FROM_0),
    "eps": (lambda x: x >= 0, _FROM_0),
    "betas": (lambda x: 0 <= x < 1, "a number from 0 to below 1"),
}
_SCHEDULER = {
    key: (lambda x: x >= 0, f"{_FROM_0}, a part of optimizer.lr")
    for key in ("alpha", "alpha_i", "alpha_f", "alpha_f_decay", "alpha_f_cooldown")
}
_CLIPPING = {
    "clipping_threshold": (
        lambda x: x > 0,
        "a number above 0; to not clip, leave out the algorithm",
    )
}
_HUB = ("token", "use_auth_token")
# Keys that decide which documents a loader reads.
_SOURCE = (
    *("hf_name", "split", "hf_kwargs", "holdout", "datasets", "remote", "local", "streams"),
    "prepared",
)


def find_fault(config: dict[str, Any]) -> str | None:
    """Return `key, value, must be ...; way out` for the first invalid value, or None.

    Args:
        config: the resolved configuration.
    """
    return next(_faults(config), None)


def _faults(config: dict[str, Any]) -> Iterator[str]:
    for key in _SECTIONS:
        section = get(config, key)
        if section is not None and not isinstance(section, dict):
            yield f"{key}, {section!r}, must be a mapping; write its settings below it"
            return  # the other checks look for keys in it
    for key, (least, most) in _WHOLE.items():
        value = get(config, key)
        if value is None or (key == "device_train_microbatch_size" and value == "auto"):
            continue
        if type(value) is not int or not least <= value <= most:
            yield f"{key}, {value!r}, must be a whole number from {least} to {most}"
    yield from _numbers(config)
    precision = config.get("precision")
    if precision is not None and precision not in _PRECISIONS:
        yield f"precision, {precision!r}, must be one of {', '.join(_PRECISIONS)}"
    for key in _TIMES:
        value = get(config, key)
        fault = None if value is None else times.find_fault(key, value, config)
        if fault is not None:
            yield fault
    saves, evaluated = (get(config, key) for key in ("save_interval", "eval_interval"))
    if saves is not None and _number(saves) == 0 and config.get("save_folder") is not None:
        yield (
            f"save_interval, {saves!r}, saves nothing; give a time above 0, such as 1ep, or leave"
            " out save_folder to train without checkpoints"
        )
    if _unit(evaluated) == "dur" and _number(evaluated) == 0:
        yield f"eval_interval, {evaluated!r}, must be an interval above 0, or 0 to never evaluate"
    by_tokens = config.get("accumulate_train_batch_on_tokens", True)
    if not by_tokens and str(get(config, "train_loader.name")).startswith("packed_"):
        yield (
            f"accumulate_train_batch_on_tokens, {by_tokens!r}, would weigh packs by their number of"
            " documents instead of their tokens with a label, so the loss would depend on the"
            " microbatches; leave it out"
        )
    duration = get(config, "max_duration")
    if duration is not None and _number(duration) <= 0:
        yield f"max_duration, {duration!r}, trains nothing; give a time above 0, such as 1ep"
    if get(config, "scheduler.name") == "inv_sqrt_with_warmup":
        for key in ("scheduler.t_warmup", "scheduler.t_scale", "scheduler.t_cooldown"):
            value = get(config, key)
            if None not in (value, duration) and _unit(value) != _unit(duration):
                yield (
                    f"{key}, {value!r}, must have the unit of max_duration, {duration!r}; give both"
                    " in tokens, such as 2_000_000tok, or set t_warmup, t_scale and t_cooldown too"
                )
    kwargs = get(config, "tokenizer.kwargs")
    for key, value in kwargs.items() if isinstance(kwargs, dict) else ():
        # Keys of the hub are not saved; most tokens of a tokenizer are text, not secrets.
        is_secret = not str(key).endswith("token") or (key not in _HUB and redact(value) != value)
        if is_secret_name(str(key)) and is_secret and value:
            yield (
                f"tokenizer.kwargs.{key} would be written into every checkpoint and export; leave"
                " it out, and give the hub's token by the variable HF_TOKEN"
            )
    yield from _rows(config)


def find_warning(config: dict[str, Any]) -> str | None:
    """Return what is unlikely to be meant, though it can be trained, or None."""
    for key in _TIMES:
        warning = times.find_warning(key, get(config, key), config)
        if warning is not None:
            return warning
    warmup, duration = get(config, "scheduler.t_warmup"), get(config, "max_duration")
    if None in (warmup, duration) or _unit(warmup) != _unit(duration):
        return None
    if _number(warmup) < _number(duration):
        return None
    return (
        f"scheduler.t_warmup, {warmup!r}, does not end before max_duration, {duration!r}, so the"
        " learning rate never reaches optimizer.lr; lower it"
    )


def evaluates(config: Mapping[str, Any]) -> bool:
    """Return whether Composer ever runs the evaluators of this configuration."""
    interval = get(config, "eval_interval")
    return bool(config.get("eval_first")) or interval is None or _number(interval) != 0


def _unit(time: Any) -> str | None:
    found = times.parse(time)
    return found and found.unit


def _number(time: Any) -> float:
    """Return the number of a time, in whatever unit; NaN if it is not a time."""
    found = times.parse(time)
    return math.nan if found is None else found.number


def _numbers(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield faults of numbers: not finite anywhere, or outside what trains a model."""
    for key, value in leaves(config, into_lists=True):
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{key}, {value!r}, must be finite; correct it or leave it out"
    optimizer = get(config, "optimizer") or {}
    groups = optimizer.get("param_groups")
    sections: list[tuple[str, Any, Mapping[str, Any]]] = [
        ("optimizer", optimizer, _OPTIMIZER),
        ("scheduler", get(config, "scheduler"), _SCHEDULER),
        ("algorithms.gradient_clipping", get(config, "algorithms.gradient_clipping"), _CLIPPING),
    ]
    for index, group in enumerate(groups if isinstance(groups, list) else ()):
        sections.append((f"optimizer.param_groups[{index}]", group, _OPTIMIZER))
    for place, section, ranges in sections:
        for key, (is_allowed, wanted) in ranges.items():
            for where, value in leaves(get(section, key), f"{place}.{key}", into_lists=True):
                is_number = isinstance(value, int | float) and not isinstance(value, bool)
                if value is not None and not (is_number and is_allowed(value)):
                    yield f"{where}, {value!r}, must be {wanted}"


def _rows(config: dict[str, Any]) -> Iterator[str]:
    """Yield faults of the data: none to train on, or evaluation on the training data."""
    train = get(config, "train_loader.dataset")
    loaders = config.get("eval_loader")
    if not str(get(config, "train_loader.name")).startswith("packed_"):
        return
    if train is None:
        yield "train_loader.dataset is missing; name its rows there, hf_name: FILE, and its split"
        return
    if not evaluates(config):
        return
    for number, loader in enumerate(loaders if isinstance(loaders, list) else [loaders]):
        dataset = get(loader, "dataset")
        if not isinstance(dataset, dict) or not any(dataset.get(key) for key in _SOURCE):
            continue
        if all(dataset.get(key) == train.get(key) for key in _SOURCE):
            place = f"eval_loader[{number}]" if isinstance(loaders, list) else "eval_loader"
            yield (
                f"{place}.dataset, {_name(dataset)}, is what train_loader trains on; evaluate on"
                f" {_other_rows(dataset)}"
            )


def _name(dataset: Mapping[str, Any]) -> str:
    streams = dataset.get("streams")
    if isinstance(streams, Mapping):
        return f"streams {', '.join(map(str, streams))}"
    names = (dataset.get(key) for key in ("prepared", "hf_name", "remote", "local", "datasets"))
    return repr(next((name for name in names if name), None))


def _other_rows(dataset: Mapping[str, Any]) -> str:
    if any(dataset.get(key) for key in ("streams", "remote", "local")):  # these have no holdout
        return "another split or folder, or set eval_interval: 0 to train without evaluating"
    return "another file or split, or give both a holdout, part: train here and part: eval there"
