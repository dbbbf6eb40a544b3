"""The pages of the reference, written from the code when the site is built."""

import argparse
import inspect
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from pydantic import BaseModel

import foundry_ext
from foundry_ext.cli.main import COMMANDS, build_parser
from foundry_ext.config.top_level_keys import REQUIRED_KEYS, TOP_LEVEL_KEYS
from foundry_ext.records import schema
from foundry_ext.records.metric import KINDS, Metric
from foundry_ext.training.logged_metrics import AGAINST_TOKENS, METRICS

ROOT = Path(__file__).parents[2]
# What an entry point's group registers -> the YAML's place for it.
GROUPS = {
    "llmfoundry_models": "model",
    "llmfoundry_dataloaders": "train_loader, eval_loader",
    "llmfoundry_optimizers": "optimizer",
    "llmfoundry_callbacks": "callbacks",
    "llmfoundry_callbacks_with_config": "callbacks that read the whole YAML",
    "llmfoundry_loggers": "loggers",
}
MEASURING = ("packed_throughput", "forgetting", "guard", "run_record")


def pages() -> dict[str, str]:
    """Return the generated pages: path in docs/ -> Markdown."""
    return {
        "reference/cli.md": cli(),
        "reference/yaml.md": yaml_keys(),
        "reference/record.md": record(),
        "reference/metrics.md": metrics(),
        "reference/api.md": api(),
    }


def cli() -> str:
    """Return the help of every command of foundry-ext."""
    os.environ["COLUMNS"] = "84"  # the width of a block of code in the site
    parts = ["# Commands\n\nThe help of each command, as `foundry-ext COMMAND --help` prints it.\n"]
    for name in COMMANDS:
        parser, _ = build_parser(name)
        [commands] = [
            action for action in parser._actions if isinstance(action, argparse._SubParsersAction)
        ]
        text = commands.choices[name].format_help()
        parts.append(f"## foundry-ext {name}\n\n```text\n{text.rstrip()}\n```\n")
    return "\n".join(parts)


def yaml_keys() -> str:
    """Return the keys of a YAML: top-level ones, and those of everything registered by name."""
    optional = ", ".join(f"`{key}`" for key in sorted(TOP_LEVEL_KEYS - REQUIRED_KEYS))
    required = ", ".join(f"`{key}`" for key in sorted(REQUIRED_KEYS))
    parts = [
        "# YAML keys\n\nA component's keyword arguments are its keys. All other components of"
        " llm-foundry and Composer can be used beside these.\n",
        f"## Top level\n\nRequired: {required}.\n\nOptional: {optional}.\n",
    ]
    for group, place in GROUPS.items():
        parts.append(f"## {place}\n")
        parts += [_documented(name, path) for name, path in _entry_points()[group].items()]
    return "\n".join(parts)


def record() -> str:
    """Return the keys of record.json, section by section."""
    sections = [
        value
        for value in vars(schema).values()
        if inspect.isclass(value)
        and issubclass(value, schema._Section)
        and value is not schema._Section
    ]
    parts = ["# The record\n\nKeys of `outputs/<run>/record.json`, schema 1.\n"]
    for section in (schema.Record, *(one for one in sections if one is not schema.Record)):
        title = "record.json" if section is schema.Record else section.__name__
        parts.append(
            f"## {title}\n\n{inspect.getdoc(section)}\n\n| key | type | meaning |\n|---|---|---|"
        )
        parts += [*_rows(section), ""]
    return "\n".join(parts)


def _rows(section: type[BaseModel]) -> Iterator[str]:
    for name, field in section.model_json_schema()["properties"].items():
        yield f"| `{name}` | {_type(field)} | {field.get('description', '')} |"


def _type(field: dict[str, Any]) -> str:
    """Return a type of JSON Schema in words."""
    if "$ref" in field:
        name = field["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in field:
        return " or ".join(map(_type, field["anyOf"]))
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if field["type"] == "array":
        return f"list of {_type(field['items'])}"
    values = field.get("additionalProperties")
    if isinstance(values, dict):
        return f"object of {_type(values)}"
    return field["type"]


def metrics() -> str:
    """Return every logged key, the kinds of learning and forgetting, and callbacks that log."""
    parts = [
        "# Metrics\n\n## Keys\n\nRuns of the shipped YAMLs log these keys to every logger; `*` is a"
        " set, an evaluator or an optimizer. W&B's own charts show those that begin with"
        f" {', '.join(f'`{group}`' for group in AGAINST_TOKENS)} against real tokens, and the"
        " others against steps. `foundry-ext dashboard` shows those that have a panel.\n",
        *_keys(),
        "\n## Learning and forgetting\n\n"
        "A key is `<set>_<kind>`, under `learning/` or `forgetting/`. Values are changes since step"
        " 0; positive means more learned, or more forgotten.\n",
        "| kind | unit in the report | factor from the record's value | right or wrong per item |",
        "|---|---|---|---|",
    ]
    for kind in KINDS:
        one = Metric("learning", f"set_{kind}")
        parts.append(
            f"| `{kind}` | {one.unit} | {one.scale:g} | {'yes' if one.is_binary else 'no'} |"
        )
    parts.append("\n## Callbacks that log\n")
    callbacks = _entry_points()["llmfoundry_callbacks"]
    parts += [_documented(name, callbacks[name]) for name in MEASURING]
    return "\n".join(parts)


def _keys() -> Iterator[str]:
    """Yield the logged metrics, a table for each writer."""
    for writer in dict.fromkeys(metric.writer for metric in METRICS):
        name = writer if writer == "Composer" else f"`{writer}`"
        yield f"\n### Logged by {name}\n\n| key | unit | meaning | panel |\n|---|---|---|---|"
        for metric in METRICS:
            if metric.writer == writer:
                only = f"; only {metric.only}" if metric.only else ""
                row = (f"`{metric.key}`", metric.unit, f"{metric.meaning}{only}", metric.section)
                yield f"| {' | '.join(row)} |"


def api() -> str:
    """Return the public names with their docstrings."""
    parts = ["# API\n\n[Python API](../python-api.md) has an example of every name.\n"]
    for name in foundry_ext.__all__:
        parts.append(f"::: foundry_ext.{foundry_ext._PUBLIC[name]}.{name}\n")
    return "\n".join(parts)


def _documented(name: str, path: str) -> str:
    return f"### `{name}`\n\n::: {path.replace(':', '.')}\n    options: {{heading_level: 4}}\n"


def _entry_points() -> dict[str, dict[str, str]]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)["project"]["entry-points"]
