"""Next steps with a folder of weights that was just written: load it, merge it, measure it."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

from foundry_ext.checkpoints.provenance import record_above
from foundry_ext.records.record import read_record
from foundry_ext.utils.errors import UserError
from foundry_ext.utils.nested import get

_SETS = "FILE"  # the reader's, as in `foundry-ext eval --help`


def next_steps(out: Path, source: Path) -> str:
    """Return lines with Python that loads the folder, and with the commands that come next.

    Args:
        out: the folder; it may hold an adapter or a full model.
        source: the weights that it was made from. The sets of their run measure the folder.
    """
    steps = [("load", _python(out)), *(("next", shlex.join(one)) for one in _commands(out, source))]
    return "\n".join(f"  {label}  {text}" for label, text in steps)


def describe_export(out: Path, source: Path) -> str:
    """Return what was exported from the checkpoint `source`, where it is and what comes next."""
    kind = f"adapter of {_base(out)}" if _is_adapter(out) else "full model"
    return f"{out}: {kind}\n{next_steps(out, source)}"


def _is_adapter(out: Path) -> bool:
    return (out / "adapter_config.json").is_file()


def _base(out: Path) -> str:
    config = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    return config["base_model_name_or_path"]


def _python(out: Path) -> str:
    package, name = "transformers", "AutoModelForCausalLM"
    if _is_adapter(out):
        package, name = "peft", "AutoPeftModelForCausalLM"  # it loads the base model, too
    return f"from {package} import {name}; model = {name}.from_pretrained({str(out)!r})"


def _commands(out: Path, source: Path) -> Iterator[list[str]]:
    yield ["foundry-ext", "eval", str(out), "--sets", _sets(source), "--out", f"{out}-eval"]
    if _is_adapter(out):
        yield ["foundry-ext", "merge", str(out), f"{out}-merged"]


def _sets(source: Path) -> str:
    """Return the record of the weights' run if it has sets to measure, else a placeholder."""
    path = record_above(source)
    try:
        record = read_record(path) if path is not None else {}
    except (OSError, UserError):
        record = {}
    return str(path) if get(record, "config.callbacks.forgetting.sets") else _SETS
