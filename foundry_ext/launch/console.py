"""Console output around a run: one line in place of its configuration, and a block at its end."""

import contextlib
import importlib
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from foundry_ext.config.outputs import EXPORT, ITEMS, METRICS, RECORD, SAVE_FOLDER, output_paths
from foundry_ext.config.run_name import under_sweep
from foundry_ext.utils.errors import UserError
from foundry_ext.utils.nested import get
from foundry_ext.utils.redaction import redact

# In the order in which they are shown.
_LABELS = {
    RECORD: "record",
    METRICS: "metrics",
    ITEMS: "items",
    SAVE_FOLDER: "checkpoints",
    EXPORT: "export",
}
_COLUMN = 13


def is_rank_zero() -> bool:
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def configuration_on_one_line(path: Path, overrides: Sequence[str]) -> Iterator[None]:
    """Give loggers the YAML without secrets, and print the command that shows it, not the YAML.

    llm-foundry prints the configuration, and Composer's console logger or progress bar prints it a
    second time: 1,000 lines for a shipped YAML. The record and the loggers have it.

    Args:
        path: the run's YAML.
        overrides: the `key=value` of the command line.
    """
    module: Any = importlib.import_module("llmfoundry.command_utils.train")
    whole = module.log_config
    command = shlex.join(["foundry-ext", "config", str(path), *overrides])

    def log_config(logger: Any, config: dict[str, Any]) -> None:
        logger.log_hyperparameters(redact(config))  # all that llm-foundry's own does, but printing
        for destination in logger.destinations:
            if hasattr(destination, "hparams_already_logged_to_console"):
                destination.hparams_already_logged_to_console = True
        if is_rank_zero():
            print(f"train.py: `{command}` prints the configuration", file=sys.stderr)

    module.log_config = log_config
    try:
        yield
    finally:
        module.log_config = whole


def format_end(config: Mapping[str, Any]) -> str:
    """Return the block that ends a run: how it went, where its files are, and what to do next.

    Args:
        config: the run's resolved configuration, with the name that the run has.
    """
    from foundry_ext.sweeps.state import read_run_record  # slow for a mere check of a YAML
    from foundry_ext.sweeps.text import duration, target_loss

    paths = {key: path for key, path in output_paths(config).items() if path.exists()}
    record = read_run_record(paths[RECORD]) if RECORD in paths else {}
    headline = f"train.py: {config.get('run_name')}: {record.get('status', 'ended')}"
    if record:
        headline += f" after {record['steps']} steps, {duration(record['time']['wall_seconds'])}"
    loss = target_loss(record)
    if loss is not None:
        headline += f", target loss {loss:.4g}"
    lines = [(label, str(paths[key])) for key, label in _LABELS.items() if key in paths]
    if record.get("status") == "finished":
        lines += [("next", shlex.join(command)) for command in _next_commands(paths, record)]
    return "\n".join([headline, *(f"  {label:<{_COLUMN}}{text}" for label, text in lines)])


def _next_commands(paths: Mapping[str, Path], record: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    """Yield the command that measures the run's sets again, and the one that compares runs."""
    path, model = paths[RECORD], paths.get(EXPORT) or record["checkpoint"]
    if model and get(record, "config.callbacks.forgetting.sets"):
        sets = ("--sets", str(path), "--out", str(path.parent / "eval"))
        yield "foundry-ext", "eval", str(model), *sets
    folders = [] if under_sweep() else _comparable(path, record["experiment"])
    if path.parent in folders:
        report = str(path.parent.parent / "report")
        runs = [str(folder) for folder in folders]
        yield "foundry-ext", "compare", *runs, *["OTHER_RUN"] * (len(runs) < 2), "--out", report


def _comparable(path: Path, experiment: str) -> list[Path]:
    """Return the folders beside a record's of finished runs that `compare` takes."""
    from foundry_ext.comparison.runs import why_left_out
    from foundry_ext.records.record import read_record

    folders = []
    for other in sorted(path.parent.parent.glob(f"*/{path.name}")):
        with contextlib.suppress(OSError, UserError):
            record = read_record(other)
            if record["experiment"] == experiment and why_left_out(record) is None:
                folders.append(other.parent)
    return folders
