"""Validates YAML values before the slow imports."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from foundry_ext.utils.nested import get
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
_TIMES = ("max_duration", "eval_interval", "save_interval", "scheduler.t_warmup")
_HUB = ("token", "use_auth_token")
_UNITS = ("ep", "ba", "sp", "tok", "dur", "iter", "sec")
_TIME = re.compile(rf"(.+?)({'|'.join(_UNITS)})", re.IGNORECASE)
# Keys that decide which documents a loader reads.
_SOURCE = ("hf_name", "split", "hf_kwargs", "holdout", "datasets", "remote", "local", "streams")


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
    rate = get(config, "optimizer.lr")
    is_number = isinstance(rate, int | float) and not isinstance(rate, bool)
    if rate is not None and not (is_number and math.isfinite(rate) and rate >= 0):
        yield f"optimizer.lr, {rate!r}, must be a number from 0 on, such as 1.0e-4"
    precision = config.get("precision")
    if precision is not None and precision not in _PRECISIONS:
        yield f"precision, {precision!r}, must be one of {', '.join(_PRECISIONS)}"
    for key in _TIMES:
        value = get(config, key)
        if value is not None and not _is_time(value):
            yield (
                f"{key}, {value!r}, must be a time: a whole number and a unit, such as 3ep or"
                f" 100ba, or a part of the duration, such as 0.1dur (units: {', '.join(_UNITS)})"
            )
        elif value is not None and _number(value) < 0:
            yield f"{key}, {value!r}, is below 0; give a time from 0 on"
    saves, evaluates = (get(config, key) for key in ("save_interval", "eval_interval"))
    if saves is not None and _number(saves) == 0 and config.get("save_folder") is not None:
        yield (
            f"save_interval, {saves!r}, saves nothing; give a time above 0, such as 1ep, or leave"
            " out save_folder to train without checkpoints"
        )
    if _in_parts(evaluates) and _number(evaluates) == 0:
        yield f"eval_interval, {evaluates!r}, must be an interval above 0, or 0 to never evaluate"
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


def _unit(time: Any) -> str:
    found = _TIME.fullmatch(time) if isinstance(time, str) else None
    return found[2].lower() if found else "ep"  # Composer's for a number


def _is_time(value: Any) -> bool:
    """Return whether Composer accepts the time: whole units, or a fraction of the duration."""
    number = _number(value)
    return not isinstance(value, bool) and (number.is_integer() or _in_parts(value))


def _in_parts(value: Any) -> bool:
    """Return whether the time is a fraction of the duration, such as 0.1dur."""
    return (
        isinstance(value, str) and value.lower().endswith("dur") and math.isfinite(_number(value))
    )


def _number(value: Any) -> float:
    """Return the number of a time, in whatever unit; NaN if it is not a time."""
    if isinstance(value, int | float):
        return float(value)
    found = _TIME.fullmatch(value) if isinstance(value, str) else None
    try:
        return float(found[1]) if found else math.nan
    except ValueError:
        return math.nan


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
            name = dataset.get("hf_name") or dataset.get("remote") or dataset.get("local")
            yield (
                f"{place}.dataset, {name!r}, is what train_loader trains on; evaluate on another"
                " file or split, or give both a holdout, part: train here and part: eval there"
            )
