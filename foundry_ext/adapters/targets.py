"""Which modules `target_modules` means, by peft's rules, and what it should not mean.

peft says nothing of an entry that matches no module as long as another one does.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from foundry_ext.utils.errors import UserError, suggest

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALL_LINEAR = "all-linear"


def matched_modules(peft_config: Mapping[str, Any], module_names: Collection[str]) -> list[str]:
    """The modules that get an adapter, by peft's rules: a list of names or endings, a regular
    expression for whole names, or "all-linear", which leaves out the head.

    Raises:
        UserError: something named matches nothing, or the head is matched.
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
    if any(ending(name) == "lm_head" for name in matched):
        raise UserError(
            "peft_config.target_modules: lm_head is tied to the embedding and its loss does not run"
            " through an adapter; leave it out"
        )
    if not matched:
        raise UserError(
            f"peft_config.exclude_modules: {shown(excluded)} leaves nothing of target_modules"
        )
    return matched


def _select(key: str, wanted: Any, names: Collection[str]) -> list[str]:
    """The names that a list of endings or a regular expression means; nothing in it idle."""
    known = ", ".join(endings(names))
    if isinstance(wanted, str):
        if key == "target_modules" and wanted.lower() == ALL_LINEAR:
            return [name for name in names if ending(name) not in ("lm_head", "embed_tokens")]
        try:
            found = [name for name in names if re.fullmatch(wanted, name)]
        except re.error as error:
            raise UserError(
                f"peft_config.{key}: {wanted!r} is no regular expression: {error}"
            ) from error
        if not found:
            raise UserError(
                f"peft_config.{key}: the regular expression {wanted!r} matches no whole module"
                f" name, such as {next(iter(names), '')}; modules end in {known}"
            )
        return found
    if not isinstance(wanted, Iterable) or not wanted:
        raise UserError(
            f"peft_config.{key}: {wanted!r}; give a list of module names, a regular expression or"
            f" {ALL_LINEAR}"
        )
    found = set()
    for entry in wanted:
        ends = [name for name in names if name == entry or name.endswith(f".{entry}")]
        if not ends:
            hint = suggest(entry, endings(names))
            raise UserError(
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
        raise UserError(
            f"peft_config.layers_to_transform: no target module in layer {missing[0]}; there are"
            f" layers {shown(sorted(numbered))}"
        )
    kept = {name for layer in layers for name in numbered[layer]}
    return [name for name in matched if name in kept]


def ending(name: str) -> str:
    return name.rpartition(".")[2]


def endings(names: Iterable[str]) -> list[str]:
    return in_order({ending(name) for name in names})


def in_order(targets: Iterable[str]) -> list[str]:
    """As the layer computes them, then others by name: peft keeps a set, whose order varies."""
    order = {name: index for index, name in enumerate(LINEARS)}
    return sorted(targets, key=lambda name: (order.get(name, len(order)), name))


def shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple | set) else str(value)
