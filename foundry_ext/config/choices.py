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
# Choices of a YAML that read files of the user's own: the variables that name them, and the
# dataset that each of them ends up in.
_OWN_FILES = {
    "data": {"train_path": "train_loader.dataset", "eval_path": "eval_loader.dataset"},
    "measure": {"forgetting_path": "callbacks.forgetting.sets.source.loader.dataset"},
}


def find_unknown_choice(config: DictConfig) -> str | None:
    """Return `variables.size, '1b': known: ...` for a variable that names no entry of its table."""
    content = OmegaConf.to_container(config, resolve=False)
    # The table that is chosen by one variable alone names it best.
    for table, names in sorted(_chosen(content), key=lambda choice: choice[1].count("$")):
        try:
            node: Any = OmegaConf.select(config, f"variables.{table}")
            for name in _VARIABLE.findall(names):
                value = OmegaConf.select(config, f"variables.{name}")
                if not isinstance(node, Mapping):
                    break
                if str(value) not in node:
                    known = [str(key) for key in node]
                    own = ""
                    # A word is no learning rate, but an entry misspelt.
                    kinds = {type(entry) for entry in node.values()}
                    is_number = kinds <= {int, float} and isinstance(value, int | float)
                    if is_number or (kinds == {str} and isinstance(value, str)):
                        entry = f"variables.{table}.{known[len(known) // 2]}"
                        own = f"; for a value of your own set {entry}={value}"
                    return (
                        f"variables.{name}, {str(value)!r}, is not in variables.{table}; known:"
                        f" {', '.join(known)}{suggest(value, known)}{own}"
                    )
                node = node[str(value)]
        except OmegaConfBaseException:
            continue  # it depends on another choice, which is the unknown one
    return None


def _chosen(content: Any) -> dict[tuple[str, str], None]:
    """Return each (table, `[${variables.NAME}]...`) that the unresolved content refers to."""
    texts = (value for _, value in leaves(content, into_lists=True) if isinstance(value, str))
    return dict.fromkeys(choice for text in texts for choice in _CHOICE.findall(text))


def _choices(content: Any) -> set[str]:
    return {name for _, names in _chosen(content) for name in _VARIABLE.findall(names)}


def find_missing_rows(config: DictConfig) -> str | None:
    """Return what is wrong with the user's own files that `data: own` or `measure: own` reads."""
    for choice, needed in _OWN_FILES.items():
        for name in needed:
            try:
                fault = _wrong_file(config, choice, needed, name)
            except OmegaConfBaseException:
                continue  # another mistake, which the check of references names
            if fault is not None:
                return fault
    return None


def _wrong_file(
    config: DictConfig, choice: str, needed: Mapping[str, str], name: str
) -> str | None:
    chosen = OmegaConf.select(config, f"variables.{choice}")
    given = OmegaConf.select(config, f"variables.{name}")
    if chosen != "own":
        if given is None or chosen is None:
            return None
        return (
            f"variables.{name}, {given!r}, would not be read, because variables.{choice} is"
            f" {chosen}; set variables.{choice}=own"
        )
    dataset = OmegaConf.select(config, needed[name])
    if dataset is None:
        return None  # nothing is evaluated
    path = get(dataset, "hf_name")
    if path is None and get(dataset, "datasets") is None:
        files = " and ".join(f"variables.{key}=FILE" for key in needed)
        return (
            f"variables.{choice}=own needs {files}, and variables.{name} is null; the comment"
            " beside it says what its rows hold"
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


def choices_in_run_name(config: DictConfig) -> set[str]:
    """Return the keys of choices that `run_name: ${variables.size}_lora` refers to."""
    content = OmegaConf.to_container(config, resolve=False)
    references = _REFERENCE.findall(str(get(content, "run_name")))
    return {key for key in references if key.removeprefix("variables.") in _choices(content)}
