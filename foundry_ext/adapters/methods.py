"""The fine-tuning methods that a `peft_config` can name, and checks of its values.

A method is a name, a rank and a scale. LoRA (arXiv 2106.09685) adds `scale * B @ A` to a frozen
weight. DoRA (arXiv 2402.09353) also trains the magnitude of each row. rsLoRA (arXiv 2312.03732)
scales by alpha/sqrt(r) instead of alpha/r. This module is plain Python over a YAML's mapping and
needs no torch.
"""

import logging
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from foundry_ext.adapters.targets import (
    LINEARS,
    ending,
    endings,
    in_order,
    matched_modules,
    shown,
)
from foundry_ext.utils.errors import UserError, suggest

log = logging.getLogger(__name__)

_DEFAULT_RANK, _DEFAULT_ALPHA = 8, 8  # peft's
_MAX_RANK = 2**13  # rows of SmolLM2's largest matrix
_KEYS = frozenset(
    {
        *("peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("rank_pattern", "alpha_pattern", "init_lora_weights"),
        # Written by peft into a saved adapter's configuration.
        *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    }
)
_LOST = "would be trained but not saved in Composer's checkpoints; leave it out"
_REFUSED = {
    "modules_to_save": _LOST,
    "trainable_token_indices": _LOST,
    "lora_bias": "adds a bias that cannot be merged, because SmolLM2 has no biases; leave it out",
    "fan_in_fan_out": "is for transposed weights, which SmolLM2 does not have; leave it out",
    "layer_replication": "changes the model, which makes comparisons unfair; leave it out",
    "use_qalora": "is for GPTQ-quantised models; leave it out",
    **dict.fromkeys(
        ("loftq_config", "eva_config", "corda_config", "megatron_config"),
        "configures an initialisation or parallelism that is not supported; leave it out",
    ),
}
# Known keys without effect unless a refused key is set.
_IDLE = frozenset({"bias", "megatron_core", "qalora_group_size", "runtime_config"})
_INITS = (True, False, "gaussian", "orthogonal", "pissa")


@dataclass(frozen=True, kw_only=True)
class Method:
    """A fine-tuning method, as a run's record and plots show it.

    `rank`, `alpha` and `effective_scale` hold for modules that no pattern changes. `init` is peft's
    `init_lora_weights`. All but `name` are None for full fine-tuning.
    """

    name: str
    rank: int | None = None
    alpha: float | None = None
    effective_scale: float | None = None
    target_modules: tuple[str, ...] | str | None = None
    init: str | bool | None = None
    dropout: float | None = None


def method_of_config(peft_config: Mapping[str, Any] | None) -> Method:
    """Return the method of a `peft_config`; None is full fine-tuning.

    Its name is full, lora, dora, rslora, or dora_rslora if both switches are on.
    """
    if peft_config is None:
        return Method(name="full")
    switches = (("dora", "use_dora"), ("rslora", "use_rslora"))
    name = "_".join(name for name, key in switches if peft_config.get(key))
    rank, alpha = _rank_and_alpha(peft_config)
    targets = peft_config.get("target_modules") or LINEARS
    return Method(
        name=name or "lora",
        rank=rank,
        alpha=alpha,
        effective_scale=_scale(rank, alpha, peft_config),
        target_modules=targets if isinstance(targets, str) else tuple(in_order(targets)),
        init=peft_config.get("init_lora_weights", True),
        dropout=peft_config.get("lora_dropout", 0.0),
    )


def with_defaults(peft_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration with all seven linears as targets if it names none.

    peft's own default for Llama, q_proj and v_proj, learns less at the same rank. `inference_mode:
    true`, which peft writes into every saved adapter, would train nothing and is taken as false.
    """
    completed = dict(peft_config)
    if completed.get("inference_mode"):
        log.warning(
            "peft_config.inference_mode: true, from a saved adapter, is taken as false: with it no"
            " parameter would be trained"
        )
        completed["inference_mode"] = False
    if completed.get("target_modules") is None:
        completed["target_modules"] = list(LINEARS)
    return completed


def scale_of(peft_config: Mapping[str, Any], module: str) -> float:
    """Return the factor before `B @ A` in a module, after rank_pattern and alpha_pattern."""
    rank, alpha = _rank_and_alpha(peft_config)
    rank = _by_pattern(peft_config.get("rank_pattern"), module, rank)
    alpha = _by_pattern(peft_config.get("alpha_pattern"), module, alpha)
    return _scale(rank, alpha, peft_config)


def check(peft_config: Mapping[str, Any], module_names: Collection[str]) -> None:
    """Check a `peft_config` before training.

    Most of these mistakes would fail late, or never: peft does not train a misspelt target and says
    nothing about it.

    Args:
        peft_config: as in the YAML, or as peft saved it.
        module_names: full names of the model's linear and embedding modules, such as
            model.layers.0.self_attn.q_proj.

    Raises:
        UserError: a key or value is not supported.
    """
    _check_keys(peft_config)
    check_numbers(peft_config)
    init = peft_config.get("init_lora_weights", True)
    if not isinstance(init, bool | str) or init not in _INITS:
        raise UserError(
            f"peft_config.init_lora_weights: {init!r} is not supported, because it changes the base"
            " model and checkpoints do not store that; use true, gaussian, orthogonal or pissa"
        )
    if peft_config.get("bias", "none") != "none":
        raise UserError(
            f"peft_config.bias: {peft_config['bias']!r} is not possible, because SmolLM2 has no"
            " biases; leave it out"
        )
    targets = matched_modules(peft_config, module_names)
    embedding = any(ending(name) == "embed_tokens" for name in targets)
    if init == "pissa" and (embedding or peft_config.get("use_dora")):
        other = "target_modules: embed_tokens" if embedding else "use_dora: true"
        raise UserError(
            f"peft_config.init_lora_weights: 'pissa' does not work with {other}; choose one of them"
        )
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern, value in (peft_config.get(key) or {}).items():
            _check_positive(f"{key}.{pattern}", value, integer=key == "rank_pattern")
            if not any(_fits_pattern(pattern, name) for name in targets):
                raise UserError(
                    f"peft_config.{key}: {pattern!r} matches none of the target modules, whose"
                    f" names end in {', '.join(endings(targets))}"
                )


def _check_keys(peft_config: Mapping[str, Any]) -> None:
    for key, value in peft_config.items():
        if key in _REFUSED:
            if value:
                raise UserError(f"peft_config.{key}: {shown(value)} {_REFUSED[key]}")
        elif key not in _KEYS | _IDLE:
            raise UserError(f"peft_config: unknown key {key!r}{suggest(key, sorted(_KEYS))}")
    for key, only in (("peft_type", "LORA"), ("task_type", "CAUSAL_LM")):
        value = peft_config.get(key)
        value = getattr(value, "value", value)  # an enumeration in peft's own configurations
        if str(value).upper() != only:
            raise UserError(f"peft_config.{key}: {value} is not supported; set it to {only}")


def check_numbers(peft_config: Mapping[str, Any]) -> None:
    """Check the rank, alpha, dropout and switches of a `peft_config`.

    Raises:
        UserError: a value has the wrong type or is out of range.
    """
    rank, alpha = _rank_and_alpha(peft_config)
    _check_positive("r", rank, integer=True)
    _check_positive("lora_alpha", alpha, integer=False)
    dropout = peft_config.get("lora_dropout", 0.0)
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise UserError(
            f"peft_config.lora_dropout: {dropout!r} must be a probability, from 0 to below 1"
        )
    for key in ("use_dora", "use_rslora"):
        if not isinstance(peft_config.get(key, False), bool):
            raise UserError(f"peft_config.{key}: {peft_config[key]!r} must be true or false")


def _check_positive(key: str, value: Any, *, integer: bool) -> None:
    types = int if integer else int | float
    limit = _MAX_RANK + 1 if integer else math.inf
    if isinstance(value, bool) or not isinstance(value, types) or not 0 < value < limit:
        wanted = f"an integer from 1 to {_MAX_RANK}" if integer else "a positive number"
        raise UserError(f"peft_config.{key}: {value!r} must be {wanted}")


def _rank_and_alpha(peft_config: Mapping[str, Any]) -> tuple[int, float]:
    return peft_config.get("r", _DEFAULT_RANK), peft_config.get("lora_alpha", _DEFAULT_ALPHA)


def _scale(rank: int, alpha: float, peft_config: Mapping[str, Any]) -> float:
    return alpha / math.sqrt(rank) if peft_config.get("use_rslora") else alpha / rank


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    matches = (value for key, value in (patterns or {}).items() if _fits_pattern(key, module))
    return next(matches, default)


def _fits_pattern(pattern: str, module: str) -> bool:
    """Match a key of rank_pattern or alpha_pattern as peft does."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None
