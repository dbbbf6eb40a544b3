"""Results of lm-evaluation-harness, entered into a run's record."""

import json
import math
from pathlib import Path
from typing import Any

from foundry_ext.records.record import read_record, write_record
from foundry_ext.utils.errors import UserError

PREFIX = "lm_eval."


def read_results(path: Path) -> dict[str, float]:
    """Return the figures in a `results_*.json` of `lm_eval --output_path`.

    Keys are `lm_eval.<task>/<metric>`. A filter other than "none" becomes part of the metric:
    gsm8k's "exact_match,strict-match" is lm_eval.gsm8k/exact_match_strict_match.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: the file is not of that form, or holds no figure.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))["results"]
        figures = {
            f"{PREFIX}{task}/{_metric(name)}": float(value)
            for task, values in results.items()
            for name, value in values.items()
            if _is_figure(name, value)
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: must be a results_*.json of lm_eval --output_path ({type(error).__name__}:"
            f" {error})"
        ) from error
    if not figures:
        raise UserError(f"{path} holds no figure of any task")
    return figures


def _is_figure(name: str, value: Any) -> bool:
    """Return whether this is a metric; not an alias or a standard error, which may be "N/A"."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and "," in name and "_stderr," not in name


def _metric(name: str) -> str:
    metric, _, filtering = name.partition(",")
    return metric if filtering == "none" else f"{metric}_{filtering.replace('-', '_')}"


def enter_results(results: Path, record: Path) -> dict[str, float]:
    """Write the figures into the last evaluation of a finished run's record, and return them.

    Figures that were entered before are replaced.

    Raises:
        FileNotFoundError: one of the files does not exist.
        UserError: the run still writes its record, or has measured nothing.
    """
    figures, content = read_results(results), read_record(record)
    if content["status"] == "running":
        raise UserError(
            f"{record}: the run is still running and would overwrite the figures; wait for its end"
        )
    if not content["evaluations"]:
        raise UserError(f"{record} holds no evaluation to enter the figures into")
    content["evaluations"][-1]["metrics"] |= figures
    write_record(record, content)
    return figures
