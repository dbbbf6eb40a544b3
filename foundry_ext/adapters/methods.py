"""The fine-tuning methods compared here: what a `peft_config` means, and what is wrong with it.

A method is a name, a rank and a scale: LoRA (arXiv 2106.09685) adds `scale * B @ A` to a frozen
weight, DoRA (arXiv 2402.09353) trains the magnitude of each row besides, rsLoRA (arXiv 2312.03732)
scales by alpha/sqrt(r) instead of alpha/r. Plain Python over the mapping of a YAML: no torch here.
"""

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

_DEFAULT_RANK, _DEFAULT_ALPHA = 8, 8  # peft's
_MOST_RANK = 2**13  # SmolLM2's largest matrix has that many rows
_KEYS = frozenset(
    {
        *("peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("rank_pattern", "alpha_pattern", "init_lora_weights"),
        # Written by peft into a saved adapter's configuration.
        *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    }
)
_LOST = "would be trained and then missing from Composer's checkpoints; leave it out"
_REFUSED = {
    "modules_to_save": _LOST,
    "trainable_token_indices": _LOST,
    "lora_bias": "adds a bias that SmolLM2's layers have no place for once merged; leave it out",
    "fan_in_fan_out": "is for weights stored transposed, which SmolLM2's are not; leave it out",
    "layer_replication": "would change the model compared; leave it out",
    "use_qalora": "is for GPTQ-quantised models; leave it out",
    **dict.fromkeys(
        ("loftq_config", "eva_config", "corda_config", "megatron_config"),
        "belongs to an initialisation or a parallelism that is not supported; leave it out",
    ),
}
# Known, and without effect unless a refused key is set.
_IDLE = frozenset({"bias", "megatron_core", "qalora_group_size", "runtime_config"})
_INITS = (True, False, "gaussian", "orthogonal", "pissa")


@dataclass(frozen=True, kw_only=True)
class Method:
    """What a run trains, as its record, its plots and its YAML's comment name it.

    `rank`, `alpha`, `effective_scale` are those of modules that no pattern changes; `init` is
    peft's `init_lora_weights`. All but `name` are None for full fine-tuning.
    """

    name: str
    rank: int | None = None
    alpha: float | None = None
    effective_scale: float | None = None
    target_modules: tuple[str, ...] | str | None = None
    init: str | bool | None = None
    dropout: float | None = None


def describe(peft_config: Mapping[str, Any] | None) -> Method:
    """Names the method of a `peft_config`; None is full fine-tuning.

    The name is full, lora, dora, rslora, or dora_rslora where both switches are on.
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
    """The configuration as it is trained: all seven linears where no target is named.

    peft's own default for Llama, q_proj and v_proj, learns less at the same rank.
    """
    filled = dict(peft_config)
    if filled.get("target_modules") is None:
        filled["target_modules"] = list(LINEARS)
    return filled


def scale_of(peft_config: Mapping[str, Any], module: str) -> float:
    """The factor before `B @ A` in one module, its patterns for rank and alpha included."""
    rank, alpha = _rank_and_alpha(peft_config)
    rank = _by_pattern(peft_config.get("rank_pattern"), module, rank)
    alpha = _by_pattern(peft_config.get("alpha_pattern"), module, alpha)
    return _scale(rank, alpha, peft_config)


def check(peft_config: Mapping[str, Any], module_names: Collection[str]) -> None:
    """Refuses what would fail late, or never: a misspelt target is silently not trained.

    Args:
        peft_config: as in the YAML, or as peft saved it.
        module_names: the model's linear and embedding modules by full name,
            e.g. model.layers.0.self_attn.q_proj.

    Raises:
        UserError: names the key, its value and the way out.
    """
    _check_keys(peft_config)
    check_numbers(peft_config)
    init = peft_config.get("init_lora_weights", True)
    if not isinstance(init, bool | str) or init not in _INITS:
        raise UserError(
            f"peft_config.init_lora_weights: {init!r} is not supported, for it changes the base"
            " model in a way that no checkpoint holds; use true, gaussian, orthogonal or pissa"
        )
    if peft_config.get("bias", "none") != "none":
        raise UserError(
            f"peft_config.bias: {peft_config['bias']!r}; SmolLM2 has no biases to train, leave"
            " it out"
        )
    targets = matched_modules(peft_config, module_names)
    embedding = any(ending(name) == "embed_tokens" for name in targets)
    if init == "pissa" and (embedding or peft_config.get("use_dora")):
        beside = "embed_tokens" if embedding else "use_dora"
        raise UserError(f"peft_config.init_lora_weights: 'pissa' does not go with {beside}")
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern, value in (peft_config.get(key) or {}).items():
            _check_positive(f"{key}.{pattern}", value, whole=key == "rank_pattern")
            if not any(_fits_pattern(pattern, name) for name in targets):
                raise UserError(
                    f"peft_config.{key}: {pattern!r} matches none of the modules that"
                    f" target_modules names; they end in {', '.join(endings(targets))}"
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
            raise UserError(
                f"peft_config.{key}: Only {only} is supported, but got {value}; set it to {only}"
            )


def check_numbers(peft_config: Mapping[str, Any]) -> None:
    """Raises ValueError for a rank, alpha, dropout or switch that cannot be, by its key."""
    rank, alpha = _rank_and_alpha(peft_config)
    _check_positive("r", rank, whole=True)
    _check_positive("lora_alpha", alpha, whole=False)
    dropout = peft_config.get("lora_dropout", 0.0)
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise UserError(
            f"peft_config.lora_dropout: {dropout!r}; give a probability from 0 to below 1"
        )
    for key in ("use_dora", "use_rslora"):
        if not isinstance(peft_config.get(key, False), bool):
            raise UserError(f"peft_config.{key}: {peft_config[key]!r}; give true or false")


def _check_positive(key: str, value: Any, *, whole: bool) -> None:
    kinds = int if whole else int | float
    below = _MOST_RANK + 1 if whole else math.inf
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < below:
        kind = f"whole number up to {_MOST_RANK}" if whole else "number"
        raise UserError(f"peft_config.{key}: {value!r}; give a positive {kind}")


def _rank_and_alpha(peft_config: Mapping[str, Any]) -> tuple[int, float]:
    return peft_config.get("r", _DEFAULT_RANK), peft_config.get("lora_alpha", _DEFAULT_ALPHA)


def _scale(rank: int, alpha: float, peft_config: Mapping[str, Any]) -> float:
    return alpha / math.sqrt(rank) if peft_config.get("use_rslora") else alpha / rank


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    found = (value for pattern, value in (patterns or {}).items() if _fits_pattern(pattern, module))
    return next(found, default)


def _fits_pattern(pattern: str, module: str) -> bool:
    """As peft matches the keys of rank_pattern and alpha_pattern."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None
