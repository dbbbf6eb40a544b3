"""Check of resolved configurations for differences other than method and learning rate.

Some keys may differ:

- the method's own keys: `model.peft_config` as a whole, and its `peft_type`, `use_dora`,
  `use_rslora`, `init_lora_weights` and `lora_alpha`, whose effect is stated as the effective scale;
- the learning rate: `optimizer.lr`, and that of LoRA+'s `param_groups`;
- the run's name, its output paths, and its labels in W&B and in its record;
- `variables`, because they only have an effect through the keys that use them.

All other keys of an adapter, such as `lora_dropout` and `target_modules`, are not part of a method
and must be equal. Seeds and ranks are values that a comparison runs through: every method needs the
same set of them.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from foundry_ext.adapters.methods import check_numbers, method_of_config
from foundry_ext.utils.errors import UserError
from foundry_ext.utils.nested import get, is_below

ABSENT = "(absent)"
_METHOD_KEYS = {"peft_type", "task_type", "use_dora", "use_rslora", "init_lora_weights"}
_ADAPTER = "model.peft_config"
_LEFT_OUT = re.compile(
    r"run_name|save_folder|variables|seed|optimizer\.lr"
    rf"|{re.escape(_ADAPTER)}\.({'|'.join(_METHOD_KEYS)}|r|lora_alpha)"
    r"|loggers\.[^.]+\.(name|group|tags|path)"
    r"|callbacks\.[^.]+\.(path|items|folder)|callbacks\.run_record\.experiment"
)
_ANY_ORDER = f"{_ADAPTER}.target_modules"
_SECTIONS = (_ADAPTER, "optimizer", "variables.learning_rates")


@dataclass(frozen=True)
class Difference:
    """One key, and its value in each configuration by the configuration's name."""

    key: str
    values: Mapping[str, Any]

    def __str__(self) -> str:
        return self.describe()

    def describe(self, *, most: int | None = None, form: Callable[[Any], str] | None = None) -> str:
        """Format as `max_duration: 1ep in a.yaml, b.yaml; 2ep in c.yaml`.

        Args:
            most: names per value; the others are counted.
            form: formats a value.
        """
        names: dict[str, list[str]] = {}
        for name, value in self.values.items():
            names.setdefault((form or _text)(value), []).append(name)
        parts = []
        for value, group in names.items():
            more = f" and {len(group) - most} more" if most and len(group) > most else ""
            parts.append(f"{value} in {', '.join(group[:most])}{more}")
        return f"{self.key}: {'; '.join(parts)}"


def differences(
    configs: Mapping[str, Mapping[str, Any]],
    *,
    allow: Sequence[str] = (),
    defaults: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Difference]:
    """Return all differences between configurations other than method and learning rate.

    Args:
        configs: resolved configurations by name (a file, a run).
        allow: dotted keys that may differ, each with all keys below it.
        defaults: for the same names, dotted key -> what a missing key means.

    Raises:
        UserError: there are fewer than two configurations, or one has a malformed section.
    """
    if len(configs) < 2:
        raise UserError(f"nothing to compare: {len(configs)} configuration(s), give two or more")
    for name, config in configs.items():
        check_sections(name, config)
    flat = {name: _comparable(config) for name, config in configs.items()}
    adapted = {name: config for name, config in configs.items() if _adapter(config)}
    unequal = []
    for key in sorted(set().union(*flat.values())):
        concerned = adapted if key.startswith(f"{_ADAPTER}.") else configs
        unequal += unequal_values(
            key, {n: flat[n].get(key, _default(key, n, defaults)) for n in concerned}
        )
    unequal += _unequal_sets(configs, "seed", lambda config: config.get("seed"))
    unequal += _unequal_sets(
        adapted, f"{_ADAPTER}.r", lambda config: method_of_config(_adapter(config)).rank
    )
    unequal += _unequal_grids(configs)
    return [each for each in unequal if not any(is_below(each.key, key) for key in allow)]


def _default(key: str, name: str, defaults: Mapping[str, Mapping[str, Any]] | None) -> Any:
    """Return what a missing key means; the records of earlier versions do not say it."""
    known = defaults or {}
    sources = [known[name]] if known.get(name) else known.values()
    values = (source[key] for source in sources if source.get(key) is not None)
    return next(values, ABSENT)


def unequal_values(key: str, values: Mapping[str, Any]) -> list[Difference]:
    """Return a difference if the values are not all equal."""
    return [Difference(key, values)] if len(set(map(_text, values.values()))) > 1 else []


def check_sections(name: str, config: Mapping[str, Any]) -> None:
    """Check the types of the sections that this module reads.

    Raises:
        UserError: a section is malformed; names it, its value and `name`.
    """
    for key in _SECTIONS:
        node: Any = config
        for part in key.split("."):
            node = node.get(part) or {}
            if not isinstance(node, Mapping):
                raise UserError(f"{name}: {key}: {node!r} must be a mapping of key: value")
    groups = _groups(config)
    if not isinstance(groups, list | tuple) or not all(isinstance(g, Mapping) for g in groups):
        raise UserError(f"{name}: optimizer.param_groups: {groups!r} must be a list of mappings")
    adapter = _adapter(config) or {}
    targets = adapter.get("target_modules") or []
    names = [targets] if isinstance(targets, str) else targets
    if not isinstance(names, list | tuple) or not all(isinstance(part, str) for part in names):
        raise UserError(
            f"{name}: peft_config.target_modules: {targets!r} must be a list of module names"
        )
    try:
        check_numbers(adapter)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error


def method(config: Mapping[str, Any]) -> str:
    """Return full, lora, dora or rslora with its variant, e.g. "lora pissa" or "lora lora+"."""
    described = method_of_config(_adapter(config))
    variants = [] if described.init in (True, None) else [str(described.init).lower()]
    if any("lora_" in str(group.get("param_str_match")) for group in _groups(config)):
        variants.append("lora+")
    return " ".join([described.name, *variants])


def by_design(configs: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the methods with their learning rates and effective scales, in one line."""
    methods: dict[str, list[str]] = {}
    for config in configs.values():
        described = method_of_config(_adapter(config))
        setting = f"lr {_text((config.get('optimizer') or {}).get('lr'))}"
        if described.effective_scale is not None:
            setting += f", r {described.rank}, scale {described.effective_scale:g}"
        settings = methods.setdefault(method(config), [])
        if setting not in settings:
            settings.append(setting)
    return "; ".join(f"{name} ({' | '.join(settings)})" for name, settings in methods.items())


def _adapter(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return (config.get("model") or {}).get("peft_config") or None


def _groups(config: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return (config.get("optimizer") or {}).get("param_groups") or []


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted key -> value of all settings that must be equal."""
    leaves = {}
    for key, value in _leaves(_without_lora_plus(config)):
        if _LEFT_OUT.fullmatch(key) or key.startswith("variables."):
            continue
        if key.endswith(".shuffle_seed") and value == config.get("seed"):
            value = "${seed}"
        if key == _ANY_ORDER and isinstance(value, Iterable) and not isinstance(value, str):
            value = sorted(map(str, value))
        leaves[key] = value
    return leaves


def _without_lora_plus(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the configuration without groups that only set a learning rate of LoRA matrices."""
    optimizer = dict(config.get("optimizer") or {})
    optimizer["param_groups"] = [
        group
        for group in _groups(config)
        if set(group) != {"param_str_match", "lr"} or "lora_" not in str(group["param_str_match"])
    ]
    return {**config, "optimizer": optimizer}


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every leaf.

    Lists of mappings are entered; any other list is one value. Null means the same as a missing
    key, and so does a section without content, but not a component without settings.
    """
    if isinstance(node, Mapping) and node:
        for name, child in node.items():
            yield from _leaves(child, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list | tuple) and any(isinstance(child, Mapping) for child in node):
        for index, child in enumerate(node):
            yield from _leaves(child, f"{key}[{index}]")
    elif node is not None and node != [] and not (node == {} and "." not in key):
        yield key, node


def _unequal_sets(
    configs: Mapping[str, Mapping[str, Any]], key: str, value_of: Callable[[Mapping], Any]
) -> list[Difference]:
    """Return a difference if one method has a value of `key` that another one lacks."""
    sets: dict[str, set[str]] = {}
    for config in configs.values():
        sets.setdefault(method(config), set()).add(_text(value_of(config)))
    if len({frozenset(values) for values in sets.values()}) <= 1:
        return []
    return [Difference(key, {name: value_of(config) for name, config in configs.items()})]


def _unequal_grids(configs: Mapping[str, Mapping[str, Any]]) -> list[Difference]:
    """Return a difference if the methods' grids of learning rates have different names."""
    key = "variables.learning_rates"
    grids = {name: sorted(map(str, get(config, key) or {})) for name, config in configs.items()}
    return unequal_values(f"{key} (names)", grids)


def _text(value: Any) -> str:
    """Format a value so that 1 equals 1.0 but not true, which is another setting."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"{value:.12g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    return str(value)
