"""Results of lm-evaluation-harness into a run's record."""

import json
import math
from pathlib import Path
from typing import Any

from foundry_ext.records.record import read_record, write_record
from foundry_ext.utils.errors import UserError

PREFIX = "lm_eval."


def read_results(path: Path) -> dict[str, float]:
    """Figures of a `results_*.json` that `lm_eval --output_path` wrote, by
    `lm_eval.<task>/<metric>`; a filter other than "none" is part of the metric.

    Example: "exact_match,strict-match" of gsm8k is lm_eval.gsm8k/exact_match_strict_match.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, or no figure in it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))["results"]
        found = {
            f"{PREFIX}{task}/{_metric(name)}": float(value)
            for task, values in results.items()
            for name, value in values.items()
            if _is_figure(name, value)
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is no results_*.json of lm_eval --output_path ({type(error).__name__}:"
            f" {error})"
        ) from error
    if not found:
        raise UserError(f"{path} holds no figure of any task")
    return found


def _is_figure(name: str, value: Any) -> bool:
    """Not the alias, nor a standard error, which stands as "N/A" where there is none."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and "," in name and "_stderr," not in name


def _metric(name: str) -> str:
    metric, _, kind = name.partition(",")
    return metric if kind == "none" else f"{metric}_{kind.replace('-', '_')}"


def enter_results(results: Path, record: Path) -> dict[str, float]:
    """Puts the figures into the last evaluation of a finished run's record; again replaces them.

    Raises:
        FileNotFoundError, ValueError: no such file, or a run that still writes its record, or has
            measured nothing.
    """
    found, content = read_results(results), read_record(record)
    if content["status"] == "running":
        raise UserError(f"{record}: the run is still running and would write over the figures")
    if not content["evaluations"]:
        raise UserError(f"{record} holds no evaluation to put the figures into")
    content["evaluations"][-1]["metrics"] |= found
    write_record(record, content)
    return found
