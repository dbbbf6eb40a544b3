"""YAML files and `key=value` overrides to checked configurations, before the slow imports.

Importing llm-foundry takes some 15 seconds, so everything that can be checked from the text is
checked here, with omegaconf alone. Every error is a UserError that reads
`<file or override>: <what>, <value>; <way out>`.
"""

import copy
import re
from collections.abc import Sequence
from functools import lru_cache
from io import StringIO
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from foundry_ext.config.automatic import AUTO, COMPILE, FIXED_SHAPE
from foundry_ext.config.choices import (
    choices_in_run_name,
    drop_absent,
    find_missing_rows,
    find_unknown_choice,
    unset,
)
from foundry_ext.config.missing_files import SUFFIXES, way_out
from foundry_ext.config.outputs import find_output_fault, find_shared
from foundry_ext.config.overrides import first_line, goes_through_reference, merge_override
from foundry_ext.config.run_name import sweep_run_name, under_sweep
from foundry_ext.config.spelling import as_in_the_sweep
from foundry_ext.config.top_level_keys import REQUIRED_KEYS, TOP_LEVEL_KEYS
from foundry_ext.config.values import find_fault
from foundry_ext.utils.errors import UserError, one_line, suggest
from foundry_ext.utils.nested import leaves
from foundry_ext.utils.redaction import is_secret_name, redact, remember_secrets

FILE_KEY = "config="
_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:")


def split_arguments(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Split `a.yaml config=b.yaml seed=1` into ([a.yaml, b.yaml], ['seed=1'])."""
    files: list[Path] = []
    overrides: list[str] = []
    for argument in arguments:
        is_yaml = argument.endswith(SUFFIXES)
        if is_yaml and argument.startswith(FILE_KEY):  # a sweep has only key=value to say it
            files.append(Path(argument.removeprefix(FILE_KEY)))
            continue
        if is_yaml and ("=" not in argument or Path(argument).is_file()):
            files.append(Path(argument))
        elif "=" in argument:
            overrides.append(argument)
        else:
            raise UserError(
                f"{argument}: neither a .yaml file nor key=value; name the run's YAML, such as"
                " yamls/smollm2_lora.yaml, and then overrides, such as seed=1"
            )
    if not files:
        raise UserError("no .yaml file given; usage: train.py a.yaml [b.yaml ...] [key=value ...]")
    return files, as_in_the_sweep(overrides)


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> DictConfig:
    """Return the file with its overrides merged in and every key and reference checked.

    Keys that do not apply to the chosen size, data set and card are left out. Under a sweep the
    overrides that run_name does not refer to become part of it, unless it is overridden itself.

    Args:
        path: the YAML file.
        overrides: `key=value` texts; they may stand in any order.

    Raises:
        UserError: the file or an override is wrong; names it and the way out.
    """
    path = Path(path)
    config = _read_yaml(path)
    remember_secrets(OmegaConf.to_container(config, resolve=False))  # an error may come at once
    given: dict[str, Any] = {}
    for override in sorted(overrides, key=lambda one: goes_through_reference(config, one)):
        key, value = merge_override(config, override)
        given[key] = value
    remember_secrets(OmegaConf.to_container(config, resolve=False))
    unset(config, [key for key, value in given.items() if value is None])
    _check_keys(path, config)
    _check_choices(path, config)
    resolved = _resolve(path, config)
    remember_secrets(resolved)
    _check_values(path, drop_absent(config, resolved))
    _check_microbatch(path, config)
    _check_compile(path, config)
    if under_sweep() and "run_name" not in given:
        named = choices_in_run_name(config)
        others = {  # names of folders are in every log, so without secrets
            key: redact(value)
            for key, value in given.items()
            if key not in named and not is_secret_name(key)
        }
        config.run_name = sweep_run_name(str(config.get("run_name") or path.stem), others)
    fault = find_output_fault(_resolve(path, config))  # the name that a sweep gives is known now
    if fault:
        raise UserError(f"{path}: {fault}")
    return config


def record_path(config: DictConfig) -> Path | None:
    """Return the path of the run's record, or None if the YAML has no run_record callback."""
    path = OmegaConf.select(config, "callbacks.run_record.path", default=None)
    return Path(str(path).replace("{run_name}", str(config.get("run_name")))) if path else None


def check_several(
    files: Sequence[Path], configs: Sequence[DictConfig], overrides: Sequence[str]
) -> None:
    """Refuse runs that would overwrite, or resume from, one another."""
    for override in overrides:
        key = override.partition("=")[0]
        if key in ("run_name", "save_folder"):
            raise UserError(
                f"override {override}: given to {len(files)} files, whose runs would overwrite one "
                f"another; set {key} in each file"
            )
    named = zip(files, configs, strict=True)
    # A file that is given twice would share everything with itself.
    runs = {
        f"{path}{' again' * files[:number].count(path)}": _plain(config)
        for number, (path, config) in enumerate(named)
    }
    shared = find_shared(runs)
    if shared:
        run, key, place, owner = shared
        raise UserError(
            f"{run}: {key}, {place!r}, is that of {owner} too, and one run would overwrite the"
            " other's files; give each run its own"
        )


def _plain(config: DictConfig) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))


def _read_yaml(path: Path) -> DictConfig:
    if not path.exists():
        raise UserError(f"{path}: no such file{way_out(path)}")
    try:
        config = copy.deepcopy(_parse(path.read_text(encoding="utf-8")))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{path}: not valid YAML{where}, {one_line(error.problem)}") from error
    except OmegaConfBaseException as error:
        where = f"{error.full_key}, " if error.full_key else ""
        raise UserError(f"{path}: {where}{first_line(error)}") from error
    # A ValueError for bytes that are no text, as for a date that is none.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML, {one_line(error)}") from error
    except (OSError, AssertionError) as error:  # OmegaConf raises these for a lone value, too
        reason = getattr(error, "strerror", None) or "a single value, not a mapping of key: value"
        raise UserError(f"{path}: {reason}") from error
    if not isinstance(config, DictConfig) or not config:
        kind = "a list" if config else "empty"
        raise UserError(f"{path}: {kind}, not a mapping; write key: value lines")
    return config


@lru_cache(maxsize=16)
def _parse(text: str) -> Any:
    """Parse a YAML once: it takes longer than all checks, and a sweep has many runs of a file."""
    return OmegaConf.load(StringIO(text))


def _check_keys(path: Path, config: DictConfig) -> None:
    for key in map(str, config):
        if key not in TOP_LEVEL_KEYS:
            raise UserError(
                f"{path}: unknown top-level key, {key!r}"
                f"{suggest(key, TOP_LEVEL_KEYS) or '; put values of your own under variables:'}"
            )
    missing = sorted(REQUIRED_KEYS - set(map(str, config)))
    if missing == ["device_train_microbatch_size"] and _is_packed(config):
        raise UserError(
            f"{path}: device_train_microbatch_size is missing; set it to 1, "
            "one pack being sized to fill the device"
        )
    if missing:
        raise UserError(f"{path}: missing top-level {_plural('key', missing)}, add with a value")


def _plural(noun: str, names: Sequence[str]) -> str:
    return f"{noun}{'s' if len(names) > 1 else ''}, {', '.join(names)}"


def _check_choices(path: Path, config: DictConfig) -> None:
    fault = find_unknown_choice(config) or find_missing_rows(config)
    if fault:
        raise UserError(f"{path}: {fault}")


def _resolve(path: Path, config: DictConfig) -> dict[str, Any]:
    for key, value in leaves(OmegaConf.to_container(config, resolve=False), into_lists=True):
        if isinstance(value, str) and _ENVIRONMENT.search(value):
            raise UserError(
                f"{path}: {key}, {value!r}, reads the environment, but the YAML alone must define"
                " the run; write the value"
            )
    try:
        return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    except OmegaConfBaseException as error:
        hint = _known_names(config, error) or "define it under variables: or correct the name"
        raise UserError(f"{path}: {error.full_key}, {first_line(error)}; {hint}") from error


def _check_values(path: Path, resolved: dict[str, Any]) -> None:
    fault = find_fault(resolved)
    if fault:
        raise UserError(f"{path}: {fault}")


def _known_names(config: DictConfig, error: OmegaConfBaseException) -> str:
    """Return `known: low, middle, high` for a name that a mapping, such as a grid, lacks."""
    _, found, rest = first_line(error).partition("Interpolation key '")
    above, _, name = rest.partition("'")[0].rpartition(".")
    siblings = OmegaConf.select(config, above, throw_on_missing=False) if found and above else None
    if above == "variables" or not isinstance(siblings, DictConfig):
        return ""
    known = [str(key) for key in siblings]
    return f"known: {', '.join(known)}{suggest(name, known)}"


def _is_packed(config: DictConfig) -> bool:
    loader = config.get("train_loader")
    return isinstance(loader, DictConfig) and str(loader.get("name")).startswith("packed_")


def _check_microbatch(path: Path, config: DictConfig) -> None:
    size = config.device_train_microbatch_size
    if _is_packed(config) and size == "auto":
        raise UserError(
            f"{path}: device_train_microbatch_size, 'auto', does not go with train_loader "
            f"{config.train_loader.name}, whose packs are sized to fill the device; set it to 1"
        )


def _check_compile(path: Path, config: DictConfig) -> None:
    """Refuse compilation without packs of one shape.

    Packs of different shapes would be compiled one after another until torch gives up.
    """
    scope = OmegaConf.select(config, COMPILE, default=AUTO)
    fixed = OmegaConf.select(config, FIXED_SHAPE, default=AUTO)
    if _is_packed(config) and scope not in ("none", AUTO) and fixed is False:
        raise UserError(
            f"{path}: model.compile, {scope!r}, needs packs of one shape; set "
            "train_loader.dataset.fixed_shape: true or auto, or compile: none"
        )
