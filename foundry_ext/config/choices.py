"""Choices from a YAML's own tables, `${variables.sizes[${variables.size}].model}`.

A variable such as `size` names an entry of a table such as `sizes`. Keys that the chosen entry has
no use for are null there, and are dropped from the configuration, see utils/absent.py.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from foundry_ext.utils.absent import run_settings
from foundry_ext.utils.errors import suggest
from foundry_ext.utils.nested import get, leaves

# ${variables.TABLE[${variables.NAME}][${variables.NAME}]...
_CHOICE = re.compile(r"\$\{variables\.(\w+)((?:\[\$\{variables\.\w+\}\])+)")
_VARIABLE = re.compile(r"\$\{variables\.(\w+)\}")
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")
_FILES = (".csv", ".json", ".jsonl", ".parquet")


def find_unknown_choice(config: DictConfig) -> str | None:
    """Return `variables.size, '1b': known: ...` for a variable that names no entry of its table."""
    content = OmegaConf.to_container(config, resolve=False)
    texts = (value for _, value in leaves(content, into_lists=True) if isinstance(value, str))
    for table, names in dict.fromkeys(choice for text in texts for choice in _CHOICE.findall(text)):
        try:
            node: Any = OmegaConf.select(config, f"variables.{table}")
            for name in _VARIABLE.findall(names):
                value = OmegaConf.select(config, f"variables.{name}")
                if not isinstance(node, Mapping):
                    break
                if str(value) not in node:
                    known = [str(key) for key in node]
                    return (
                        f"variables.{name}, {str(value)!r}, is not in variables.{table}; known:"
                        f" {', '.join(known)}{suggest(value, known)}"
                    )
                node = node[str(value)]
        except OmegaConfBaseException:
            continue  # it depends on another choice, which is the unknown one
    return None


def find_missing_rows(config: DictConfig) -> str | None:
    """Return what is wrong with the files that `variables.data=own` needs, or None."""
    if get(OmegaConf.to_container(config, resolve=False), "variables.data") != "own":
        return None
    for loader, name in (("train_loader", "train_path"), ("eval_loader", "eval_path")):
        try:
            path = OmegaConf.select(config, f"{loader}.dataset.hf_name")
            mixture = OmegaConf.select(config, f"{loader}.dataset.datasets")
        except OmegaConfBaseException:
            continue  # another mistake, which the check of references names
        if path is None and mixture is None:
            return (
                "variables.data=own needs variables.train_path=FILE and variables.eval_path=FILE,"
                f" and variables.{name} is null; a file's rows have a prompt and a response"
            )
        file = Path(str(path))
        if file.suffix in _FILES and "://" not in str(path) and not file.is_file():
            return f"variables.{name}, {path!r}, does not exist (in {Path.cwd()}); correct the path"
    return None


def unset(config: DictConfig, keys: Iterable[str]) -> None:
    """Remove the callbacks, loggers and algorithms that an override made null.

    llm-foundry builds a callback whose settings are null with its defaults.
    """
    for key in keys:
        section, _, name = key.partition(".")
        given = config.get(section) if section in ("callbacks", "loggers", "algorithms") else None
        if given and name in given and given[name] is None:
            del given[name]


def drop_absent(config: DictConfig, resolved: dict[str, Any]) -> dict[str, Any]:
    """Remove what does not apply to the chosen entries, with references left as they are.

    Args:
        config: to remove it from.
        resolved: the content of `config`; returned without what was removed.
    """
    kept = run_settings(resolved)
    _keep(config, resolved, kept)
    return kept


def _keep(node: Any, before: Any, after: Any) -> None:
    """Remove from `node` what is in `before` and not in `after`."""
    if isinstance(before, dict):
        for key, value in before.items():
            if key in after:
                if value != after[key]:
                    _keep(node[key], value, after[key])
            elif key in node:  # two references may lead to one node
                del node[key]
    elif isinstance(before, list):
        for index, value in enumerate(before):
            if value != after[index]:
                _keep(node[index], value, after[index])


def goes_through_reference(config: DictConfig, override: str) -> bool:
    """Return whether an override sets a key inside a mapping that refers to another one.

    `sets.target.loader.dataset.split=x` with `loader: ${eval_loader}` takes a copy of eval_loader
    as it is then, so it must come after the overrides of eval_loader itself.
    """
    node: Any = OmegaConf.to_container(config, resolve=False)
    for part in override.partition("=")[0].split("."):
        if isinstance(node, str) and "${" in node:
            return True
        node = node.get(part) if isinstance(node, dict) else None
    return False


def keys_in_run_name(config: DictConfig) -> set[str]:
    """Return the keys that `run_name: ${variables.size}_lora` refers to."""
    content = OmegaConf.to_container(config, resolve=False)
    return set(_REFERENCE.findall(str(get(content, "run_name"))))
