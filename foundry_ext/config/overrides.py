"""Overrides `key=value` merged into a configuration."""

import re
from collections.abc import Sequence
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from foundry_ext.utils.errors import UserError, one_line, suggest


def first_line(error: OmegaConfBaseException) -> str:
    """Return OmegaConf's message without the lines that repeat key and type."""
    return (error.msg or str(error)).strip().partition("\n")[0]


def parse_value(text: str) -> Any:
    """Return the value of an override from its text after '='; references stay as they are.

    Raises:
        UserError: the text is not YAML.
    """
    try:
        return OmegaConf.to_container(OmegaConf.from_cli([f"x={text}"]), resolve=False)["x"]  # pyright: ignore
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise UserError(one_line(error).split(" in ")[0]) from error


def merge_override(config: DictConfig, override: str) -> tuple[str, Any]:
    """Set `optimizer.lr=1e-4` in the configuration; return its dotted key and value.

    Raises:
        UserError: the path or the kind of the value does not fit.
    """
    key, _, text = override.partition("=")
    node: Any = OmegaConf.to_container(config, resolve=False)
    parts = _split_key(node, key)
    if not all(parts):
        raise UserError(f"override {override}: no key before '=', write key=value")
    if not text.strip():
        raise UserError(f"override {override}: no value after '=', write {key}=null to unset")
    try:
        new = parse_value(text)
    except ValueError as error:
        raise UserError(f"override {override}: value is not YAML, {error}; quote it") from error

    for depth, part in enumerate(parts):
        is_reference = isinstance(node, str) and "${" in node
        if not (node is None or isinstance(node, dict) or is_reference):
            kind = "list" if isinstance(node, list) else "single value"
            raise UserError(
                f"override {override}: {'.'.join(parts[:depth])} is a {kind}, not a mapping; "
                "override it as a whole, or edit the file"
            )
        node = node.get(part) if isinstance(node, dict) else None
    for kind, example in ((dict, f"{key}.name=..."), (list, f"{key}=[...]")):
        if isinstance(node, kind) and new is not None and not isinstance(new, kind):
            name = "mapping" if kind is dict else "list"
            raise UserError(
                f"override {override}: {key} is a {name}, which {text!r} would replace; "
                f"write {example}, or {key}=null to unset"
            )
    _check_variable(config, override, parts)
    update = new
    for part in reversed(parts):
        update = {part: update}
    try:
        config.merge_with(update)  # in place: OmegaConf.merge copies all of it
    except OmegaConfBaseException as error:  # the path goes through a reference to a list
        raise UserError(
            f"override {override}: {first_line(error)}; override the list as a whole, or edit the"
            " file"
        ) from error
    return ".".join(parts), new


def goes_through_reference(config: DictConfig, override: str) -> bool:
    """Return whether an override sets a key inside a mapping that refers to another one.

    `sets.target.loader.dataset.split=x` with `loader: ${eval_loader}` takes a copy of eval_loader
    as it is then, so it must come after the overrides of eval_loader itself.
    """
    node: Any = OmegaConf.to_container(config, resolve=False)
    for part in _split_key(node, override.partition("=")[0]):
        if isinstance(node, str) and "${" in node:
            return True
        node = node.get(part) if isinstance(node, dict) else None
    return False


def _split_key(node: Any, key: str) -> list[str]:
    """Split a dotted or bracketed key, but not a name of the file that has a dot.

    variables.sizes.1.7b.model, variables.sizes[1.7b].model -> [variables, sizes, 1.7b, model]
    """
    words, parts = key.replace("[", ".").replace("]", "").split("."), []
    while words:
        names = [".".join(words[:count]) for count in range(len(words), 0, -1)]
        name = next((name for name in names if isinstance(node, dict) and name in node), words[0])
        parts.append(name)
        words = words[name.count(".") + 1 :]
        node = node.get(name) if isinstance(node, dict) else None
    return parts


def _check_variable(config: DictConfig, override: str, parts: Sequence[str]) -> None:
    """Refuse a variable that nothing reads, because the run would silently ignore it."""
    if parts[0] != "variables" or len(parts) < 2:
        return
    known = list(map(str, config.get("variables") or {}))
    whole = str(OmegaConf.to_container(config, resolve=False))
    if parts[1] not in known and not re.search(rf"variables\.{re.escape(parts[1])}\b", whole):
        raise UserError(
            f"override {override}: no variable {parts[1]!r}{suggest(parts[1], known) or ';'}"
            f" the file has {', '.join(known) or 'none'}"
        )
