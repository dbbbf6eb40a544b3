"""Sweep files in W&B's format, expanded into the runs that `wandb agent` would start.

    program: train.py
    method: grid
    command: [composer, "${program}", "${args_no_hyphens}"]
    parameters:
      config: {values: [a.yaml, b.yaml]}
      seed: {values: [17, 18]}

starts `composer train.py config=a.yaml seed=17`, then seed=18, then b.yaml with both seeds.
Parameters are sorted by name and the last one varies fastest, as in W&B's grid search. Every
mistake is a ValueError that names the file, the key and the way out.
"""

import itertools
import json
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from foundry_ext.sweeps.parameters import Parameter, parameter
from foundry_ext.utils.errors import UserError

KEYS = {
    *("command", "description", "entity", "method", "metric", "name", "parameters", "program"),
    *("project", "run_cap"),
}
DEFAULT_COMMAND = ("${env}", "${interpreter}", "${program}", "${args}")
MACROS = (
    *("${env}", "${interpreter}", "${program}"),
    *("${args}", "${args_no_hyphens}", "${args_no_boolean_flags}", "${args_json}"),
)
NAME_PATTERN = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")  # of a parameter, from W&B
DEFAULT_SEED = 17
_TRIES_PER_RUN = 200


@dataclass(frozen=True)
class Sweep:
    """A checked sweep file."""

    path: Path
    name: str
    """A valid folder name: the key `name`, else the file's stem, or its folder for sweep.yaml."""
    method: str
    program: str
    command: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    run_cap: int | None


def read_sweep(path: Path) -> Sweep:
    """Read and check a sweep file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such sweep file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))  # as `wandb sweep` reads it
    # An impossible date or undecodable bytes are a ValueError.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML, {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: not a mapping; write method:, program: and parameters:")
    try:
        return _sweep(path, content)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def _sweep(path: Path, content: Mapping[str, Any]) -> Sweep:
    if "early_terminate" in content:
        raise UserError("early_terminate needs W&B's server: use `wandb sweep`, or remove it")
    unknown = sorted(set(map(str, content)) - KEYS)
    if unknown:
        raise UserError(f"unknown key, {unknown[0]!r}; known: {', '.join(sorted(KEYS))}")
    for key in ("method", "program", "parameters"):
        if key not in content:
            raise UserError(f"{key} is missing; add it")
    method = content["method"]
    if method == "bayes":
        raise UserError("method bayes needs W&B's server: use `wandb sweep`, or grid or random")
    if method not in ("grid", "random"):
        raise UserError(f"method, {method!r}, is neither grid nor random")
    cap = content.get("run_cap")
    if cap is not None and (type(cap) is not int or cap < 1):
        raise UserError(f"run_cap, {cap!r}, is not a whole number above 0")
    parameters = tuple(_parameters(content["parameters"]))
    if method == "grid":
        for entry in parameters:
            entry.grid_values()
    return Sweep(
        path=path,
        name=_name(path, content.get("name")),
        method=method,
        program=inside(str(content["program"]), "program"),
        command=_command(content.get("command")),
        parameters=parameters,
        run_cap=cap,
    )


def _name(path: Path, given: Any) -> str:
    text = str(given or (path.parent.resolve().name if path.stem == "sweep" else path.stem))
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")
    if not name:
        raise UserError(f"name, {text!r}, has no letter or digit for a folder's name")
    return name


def inside(path: str, what: str) -> str:
    """Return `path` if it is inside the current folder, without following symbolic links."""
    relative = os.path.relpath(os.path.normpath(path), os.getcwd())
    if relative.split(os.sep)[0] == os.pardir:
        raise UserError(f"{what}, {path!r}, is outside this folder; start in the folder above it")
    return path


def _command(given: Any) -> tuple[str, ...]:
    if given is None:
        return DEFAULT_COMMAND
    if not isinstance(given, list) or not given:
        raise UserError(f"command, {given!r}, is not a list; write one argument an item")
    command = tuple(map(str, given))
    for chunk in command:
        if "${" in chunk and chunk not in MACROS:
            raise UserError(
                f"command: {chunk!r} is no macro known here; known: {', '.join(MACROS)}"
            )
    if "${program}" not in command:
        raise UserError("command does not hold ${program}; add it")
    return command


def _parameters(entries: Any, above: tuple[str, ...] = ()) -> Iterator[Parameter]:
    """Yield parameters sorted by name at each level, as W&B flattens nested ones."""
    where = f"parameter {'.'.join(above)}: parameters" if above else "parameters"
    if not isinstance(entries, dict) or not entries:
        raise UserError(f"{where} is empty or not a mapping; write name: {{values: [...]}}")
    for name in sorted(map(str, entries)):
        path = (*above, name)
        entry = entries.get(name)
        if not NAME_PATTERN.fullmatch(name):
            raise UserError(
                f"parameter {name!r} is not a name; use letters, digits, dots, dashes, underscores"
            )
        if not isinstance(entry, dict) or not entry:
            raise UserError(
                f"parameter {'.'.join(path)}: no value; write {name}: {{value: ...}} or values"
            )
        if "parameters" in entry:
            if len(entry) > 1:
                raise UserError(f"parameter {'.'.join(path)}: parameters stands alone")
            yield from _parameters(entry["parameters"], path)
        else:
            yield parameter(path, entry)


def expand(
    sweep: Sweep, *, num_runs: int | None = None, seed: int = DEFAULT_SEED
) -> list[dict[str, Any]]:
    """Return the parameters of every run as {name: value}; nested ones are nested mappings.

    `num_runs` and run_cap limit the number of runs; method random needs at least one of them.
    A random sweep draws every combination at most once.
    """
    caps = [cap for cap in (num_runs, sweep.run_cap) if cap is not None]
    if num_runs is not None and num_runs < 1:
        raise UserError(f"number of runs, {num_runs}, is not above 0")
    if sweep.method == "grid":
        combinations = itertools.product(*(entry.grid_values() for entry in sweep.parameters))
        chosen = list(itertools.islice(combinations, min(caps, default=None)))
    elif caps:
        chosen = _random_combinations(sweep, min(caps), seed)
    else:
        raise UserError(f"{sweep.path}: method random has no end; set run_cap or give --runs")
    return [_nested(sweep.parameters, values) for values in chosen]


def _random_combinations(sweep: Sweep, count: int, seed: int) -> list[tuple[Any, ...]]:
    rng = random.Random(seed)
    chosen: list[tuple[Any, ...]] = []
    for _ in range(count * _TRIES_PER_RUN):
        values = tuple(entry.draw(rng) for entry in sweep.parameters)
        if values not in chosen:
            chosen.append(values)
        if len(chosen) == count:
            return chosen
    raise UserError(
        f"{sweep.path}: {count} runs asked for, but {len(chosen)} different ones were drawn; "
        "ask for fewer, or use method grid"
    )


def _nested(parameters: Sequence[Parameter], values: Sequence[Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for entry, value in zip(parameters, values, strict=True):
        node = tree
        for name in entry.path[:-1]:
            node = node.setdefault(name, {})
        node[entry.path[-1]] = value
    return tree


def command_line(sweep: Sweep, run: Mapping[str, Any], *, interpreter: str = "python") -> list[str]:
    """Return the command of a run as a list of arguments, to be started without a shell.

    Values are formatted with str, as W&B's agent does: `seed=17`, `optimizer={'lr': 0.1}`.
    """
    plain = [f"{name}={value}" for name, value in run.items()]
    macros = {
        "${env}": ["/usr/bin/env"],
        "${interpreter}": [interpreter],
        "${program}": [sweep.program],
        "${args}": [f"--{text}" for text in plain],
        "${args_no_hyphens}": plain,
        "${args_no_boolean_flags}": [
            f"--{name}" if value is True else f"--{name}={value}"
            for name, value in run.items()
            if value is not False
        ],
        "${args_json}": [json.dumps(run)],
    }
    return [argument for chunk in sweep.command for argument in macros.get(chunk, [chunk])]
