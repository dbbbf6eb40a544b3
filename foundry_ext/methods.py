"""The fine-tuning methods compared here: what a `peft_config` means, and what is wrong with it.

A method is a name, a rank and a scale: LoRA (arXiv 2106.09685) adds `scale * B @ A` to a frozen
weight, DoRA (arXiv 2402.09353) trains the magnitude of each row besides, rsLoRA (arXiv 2312.03732)
scales by alpha/sqrt(r) instead of alpha/r. Plain Python over the mapping of a YAML: no torch here.
"""

import difflib
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALL_LINEAR = "all-linear"

_DEFAULT_RANK, _DEFAULT_ALPHA = 8, 8  # peft's
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
        target_modules=targets if isinstance(targets, str) else tuple(_in_order(targets)),
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
        ValueError: names the key, its value and the way out.
    """
    _check_keys(peft_config)
    _check_numbers(peft_config)
    init = peft_config.get("init_lora_weights", True)
    if not isinstance(init, bool | str) or init not in _INITS:
        raise ValueError(
            f"peft_config.init_lora_weights: {init!r} is not supported, for it changes the base"
            " model in a way that no checkpoint holds; use true, gaussian, orthogonal or pissa"
        )
    if peft_config.get("bias", "none") != "none":
        raise ValueError(
            f"peft_config.bias: {peft_config['bias']!r}; SmolLM2 has no biases to train, leave"
            " it out"
        )
    targets = matched_modules(peft_config, module_names)
    embedding = any(_ending(name) == "embed_tokens" for name in targets)
    if init == "pissa" and (embedding or peft_config.get("use_dora")):
        beside = "embed_tokens" if embedding else "use_dora"
        raise ValueError(f"peft_config.init_lora_weights: 'pissa' does not go with {beside}")
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern, value in (peft_config.get(key) or {}).items():
            _check_positive(f"{key}.{pattern}", value, whole=key == "rank_pattern")
            if not any(_fits_pattern(pattern, name) for name in targets):
                raise ValueError(
                    f"peft_config.{key}: {pattern!r} matches none of the modules that"
                    f" target_modules names; they end in {', '.join(_endings(targets))}"
                )


def matched_modules(peft_config: Mapping[str, Any], module_names: Collection[str]) -> list[str]:
    """The modules that get an adapter, by peft's rules: a list of names or endings, a regular
    expression for whole names, or "all-linear", which leaves out the head.

    Raises:
        ValueError: something named matches nothing, or the head is matched.
    """
    targets = peft_config.get("target_modules")
    targets = LINEARS if targets is None else targets
    matched = _select("target_modules", targets, module_names)
    excluded = peft_config.get("exclude_modules")
    if excluded:
        left_out = set(_select("exclude_modules", excluded, module_names))
        matched = [name for name in matched if name not in left_out]
    layers = peft_config.get("layers_to_transform")
    if layers is not None and layers != []:
        matched = _in_layers(peft_config, matched, {layers} if isinstance(layers, int) else layers)
    if any(_ending(name) == "lm_head" for name in matched):
        raise ValueError(
            "peft_config.target_modules: lm_head is tied to the embedding and its loss does not run"
            " through an adapter; leave it out"
        )
    if not matched:
        raise ValueError(
            f"peft_config.exclude_modules: {_shown(excluded)} leaves nothing of target_modules"
        )
    return matched


def _select(key: str, wanted: Any, names: Collection[str]) -> list[str]:
    """The names that a list of endings or a regular expression means; nothing in it idle."""
    known = ", ".join(_endings(names))
    if isinstance(wanted, str):
        if key == "target_modules" and wanted.lower() == ALL_LINEAR:
            return [name for name in names if _ending(name) not in ("lm_head", "embed_tokens")]
        try:
            found = [name for name in names if re.fullmatch(wanted, name)]
        except re.error as error:
            raise ValueError(
                f"peft_config.{key}: {wanted!r} is no regular expression: {error}"
            ) from error
        if not found:
            raise ValueError(
                f"peft_config.{key}: the regular expression {wanted!r} matches no whole module"
                f" name, such as {next(iter(names), '')}; modules end in {known}"
            )
        return found
    if not isinstance(wanted, Iterable) or not wanted:
        raise ValueError(
            f"peft_config.{key}: {wanted!r}; give a list of module names, a regular expression or"
            f" {ALL_LINEAR}"
        )
    found = set()
    for entry in wanted:
        ends = [name for name in names if name == entry or name.endswith(f".{entry}")]
        if not ends:
            hint = _nearest(str(entry), _endings(names))
            raise ValueError(
                f"peft_config.{key}: {entry!r} matches no module{hint}; modules end in {known}"
            )
        found.update(ends)
    return [name for name in names if name in found]


def _in_layers(
    peft_config: Mapping[str, Any], matched: list[str], layers: Collection[int]
) -> list[str]:
    patterns = peft_config.get("layers_pattern") or r"[^.]*"
    patterns = [patterns] if isinstance(patterns, str) else patterns
    numbered = {}
    for name in matched:
        found = (re.match(rf".*\.{pattern}\.(\d+)\.", name) for pattern in patterns)
        index = next((match for match in found if match), None)
        if index:
            numbered.setdefault(int(index[1]), []).append(name)
    missing = [layer for layer in layers if layer not in numbered]
    if missing:
        raise ValueError(
            f"peft_config.layers_to_transform: no target module in layer {missing[0]}; there are"
            f" layers {_shown(sorted(numbered))}"
        )
    kept = {name for layer in layers for name in numbered[layer]}
    return [name for name in matched if name in kept]


def _check_keys(peft_config: Mapping[str, Any]) -> None:
    for key, value in peft_config.items():
        if key in _REFUSED:
            if value:
                raise ValueError(f"peft_config.{key}: {_shown(value)} {_REFUSED[key]}")
        elif key not in _KEYS | _IDLE:
            raise ValueError(
                f"peft_config: {key!r} is no key of it{_nearest(str(key), sorted(_KEYS))}"
            )
    for key, only in (("peft_type", "LORA"), ("task_type", "CAUSAL_LM")):
        value = peft_config.get(key)
        value = getattr(value, "value", value)  # an enumeration in peft's own configurations
        if str(value).upper() != only:
            raise ValueError(
                f"peft_config.{key}: Only {only} is supported, but got {value}; set it to {only}"
            )


def _check_numbers(peft_config: Mapping[str, Any]) -> None:
    rank, alpha = _rank_and_alpha(peft_config)
    _check_positive("r", rank, whole=True)
    _check_positive("lora_alpha", alpha, whole=False)
    dropout = peft_config.get("lora_dropout", 0.0)
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(
            f"peft_config.lora_dropout: {dropout!r}; give a probability from 0 to below 1"
        )
    for key in ("use_dora", "use_rslora"):
        if not isinstance(peft_config.get(key, False), bool):
            raise ValueError(f"peft_config.{key}: {peft_config[key]!r}; give true or false")


def _check_positive(key: str, value: Any, *, whole: bool) -> None:
    kinds = int if whole else int | float
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < math.inf:
        kind = "whole number" if whole else "number"
        raise ValueError(f"peft_config.{key}: {value!r}; give a positive {kind}")


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


def _ending(name: str) -> str:
    return name.rpartition(".")[2]


def _endings(names: Iterable[str]) -> list[str]:
    return _in_order({_ending(name) for name in names})


def _in_order(targets: Iterable[str]) -> list[str]:
    """As the layer computes them, then others by name: peft keeps a set, whose order varies."""
    order = {name: index for index, name in enumerate(LINEARS)}
    return sorted(targets, key=lambda name: (order.get(name, len(order)), name))


def _nearest(word: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple | set) else str(value)
