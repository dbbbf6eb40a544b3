"""The modules that `target_modules` selects, by peft's rules, and checks of the selection.

peft reports an entry that matches no module only if no other entry matches either.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from foundry_ext.utils.errors import UserError, suggest

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALL_LINEAR = "all-linear"


def matched_modules(peft_config: Mapping[str, Any], module_names: Collection[str]) -> list[str]:
    """Return the modules that get an adapter.

    Args:
        peft_config: its `target_modules` is a list of names or endings, a regular expression that
            must match a full name, or "all-linear", which leaves out the head.
        module_names: full names of the model's linear and embedding modules.

    Raises:
        UserError: an entry matches nothing, or the head is matched.
    """
    targets = peft_config.get("target_modules")
    targets = LINEARS if targets is None else targets
    matched = _select("target_modules", targets, module_names)
    excluded = peft_config.get("exclude_modules")
    if excluded:
        unwanted = set(_select("exclude_modules", excluded, module_names))
        matched = [name for name in matched if name not in unwanted]
    layers = peft_config.get("layers_to_transform")
    if layers is not None and layers != []:
        matched = _in_layers(peft_config, matched, {layers} if isinstance(layers, int) else layers)
    if any(ending(name) == "lm_head" for name in matched):
        raise UserError(
            "peft_config.target_modules: lm_head cannot have an adapter, because the loss uses its"
            " weight directly and it is tied to the embedding; leave it out"
        )
    if not matched:
        raise UserError(
            f"peft_config.exclude_modules: {shown(excluded)} excludes all target modules; exclude"
            " fewer"
        )
    return matched


def _select(key: str, wanted: Any, names: Collection[str]) -> list[str]:
    """Return the names that a list of endings or a regular expression selects.

    Raises:
        UserError: the expression, or an entry of the list, selects nothing.
    """
    known = ", ".join(endings(names))
    if isinstance(wanted, str):
        if key == "target_modules" and wanted.lower() == ALL_LINEAR:
            return [name for name in names if ending(name) not in ("lm_head", "embed_tokens")]
        try:
            matched = [name for name in names if re.fullmatch(wanted, name)]
        except re.error as error:
            raise UserError(
                f"peft_config.{key}: {wanted!r} is not a valid regular expression: {error}"
            ) from error
        if not matched:
            raise UserError(
                f"peft_config.{key}: the regular expression {wanted!r} matches no full module name,"
                f" such as {next(iter(names), '')}; module names end in {known}"
            )
        return matched
    if not isinstance(wanted, Iterable) or not wanted:
        raise UserError(
            f"peft_config.{key}: {wanted!r} must be a list of module names, a regular expression or"
            f" {ALL_LINEAR}"
        )
    selected = set()
    for entry in wanted:
        matched = [name for name in names if name == entry or name.endswith(f".{entry}")]
        if not matched:
            hint = suggest(entry, endings(names))
            raise UserError(
                f"peft_config.{key}: {entry!r} matches no module{hint}; module names end in {known}"
            )
        selected.update(matched)
    return [name for name in names if name in selected]


def _in_layers(
    peft_config: Mapping[str, Any], matched: list[str], layers: Collection[int]
) -> list[str]:
    patterns = peft_config.get("layers_pattern") or r"[^.]*"
    patterns = [patterns] if isinstance(patterns, str) else patterns
    by_layer = {}
    for name in matched:
        matches = (re.match(rf".*\.{pattern}\.(\d+)\.", name) for pattern in patterns)
        match = next(filter(None, matches), None)
        if match:
            by_layer.setdefault(int(match[1]), []).append(name)
    missing = [layer for layer in layers if layer not in by_layer]
    if missing:
        raise UserError(
            f"peft_config.layers_to_transform: no target module in layer {missing[0]}; layers with"
            f" target modules are {shown(sorted(by_layer))}"
        )
    selected = {name for layer in layers for name in by_layer[layer]}
    return [name for name in matched if name in selected]


def ending(name: str) -> str:
    """Return the last part of a dotted name: q_proj of model.layers.0.self_attn.q_proj."""
    return name.rpartition(".")[2]


def endings(names: Iterable[str]) -> list[str]:
    """Return the distinct endings of module names, in order."""
    return in_order({ending(name) for name in names})


def in_order(targets: Iterable[str]) -> list[str]:
    """Return targets in the order a layer computes them, then others by name."""
    # peft keeps a set, whose order varies between processes.
    order = {name: index for index, name in enumerate(LINEARS)}
    return sorted(targets, key=lambda name: (order.get(name, len(order)), name))


def shown(value: Any) -> str:
    """Return a value as an error shows it: lists without brackets."""
    return ", ".join(map(str, value)) if isinstance(value, list | tuple | set) else str(value)
