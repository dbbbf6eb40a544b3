"""The messages of a sweep: size and cost before it starts, a table of its runs at the end."""

import os
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from foundry_ext.records.schema import LARGEST_COUNT
from foundry_ext.sweeps.plan import CostEstimate, SweepRunResult
from foundry_ext.sweeps.state import read_run_record
from foundry_ext.utils.nested import get


def format_sweep(
    name: str,
    statuses: Sequence[str],
    cost_estimates: Sequence[CostEstimate],
    parallel: int,
    launcher: str,
    *,
    retry_failed: bool,
) -> list[str]:
    """Return lines about the size and the cost of a sweep that is about to start.

    `statuses` are those of all runs, `cost_estimates` those of the runs to start.
    """
    count = Counter(statuses)
    parts = [f"{len(cost_estimates)} to start", f"{count['finished']} finished already"]
    if count["running"]:
        parts.append(f"{count['running']} still running")
    if count["failed"] and not retry_failed:
        parts.append(f"{count['failed']} failed before (--retry-failed starts them again)")
    how = f"{parallel} at once, launcher {launcher}"
    lines = [f"sweep {name}: {len(statuses)} runs, {', '.join(parts)}; {how}"]
    if cost_estimates:
        time_text = _format_time(cost_estimates, parallel)
        lines.append(f"tokens: {_format_tokens(cost_estimates)}; time: {time_text}")
    return lines


def _format_tokens(cost_estimates: Sequence[CostEstimate]) -> str:
    known = [cost.tokens for cost in cost_estimates if cost.tokens is not None]
    if len(known) < len(cost_estimates):
        num_unknown = len(cost_estimates) - len(known)
        return f"unknown until the data is read, for {num_unknown} of {len(cost_estimates)} runs"
    bound = "at most " if any(cost.is_bound for cost in cost_estimates) else ""
    return f"{bound}{sum(known):,.0f}"


def estimate_hours(cost_estimates: Sequence[CostEstimate], parallel: int) -> float | None:
    """Return the estimated duration of all runs together; None if one of them is unknown."""
    seconds = [cost.seconds for cost in cost_estimates if cost.seconds is not None]
    if len(seconds) < len(cost_estimates):
        return None
    return sum(seconds) / min(parallel, max(1, len(seconds))) / 3600


def _format_time(cost_estimates: Sequence[CostEstimate], parallel: int) -> str:
    hours = estimate_hours(cost_estimates, parallel)
    if hours is not None:
        return f"about {duration(hours * 3600)}"
    if any(cost.tokens is None for cost in cost_estimates):
        return "unknown until the first runs have finished"
    return "unknown, no finished run of each model and method to go by (--tokens-per-second)"


def last_error(log: Path) -> str:
    """Return what train.py's error line says in the last attempt of a log, or an empty string."""
    if not log.exists():  # of a run that an earlier sweep had started
        return ""
    text = log.read_text(encoding="utf-8", errors="replace").rpartition("--- attempt ")[2]
    _, found, said = text.rpartition("train.py: error: ")
    return shorten(said.partition("\n")[0], 400, placeholder=" ...") if found else ""


def format_summary(results: Sequence[SweepRunResult]) -> list[str]:
    """Return a table of all runs."""
    finished = [result for result in results if result.status == "finished"]
    width = max(len(result.name) for result in results)
    lines = [
        f"{len(finished)} of {len(results)} runs finished",
        f"  {'run':<{width}}  {'status':<8}  {'target loss':>11}  {'time':>10}",
    ]
    for result in results:
        loss = target_loss(read_run_record(result.record)) if result in finished else None
        loss_text = "-" if loss is None else f"{loss:.4f}"
        time_text = duration(result.seconds) if result.seconds else "-"
        lines.append(
            f"  {result.name:<{width}}  {result.status:<8}  {loss_text:>11}  {time_text:>10}"
        )
    return lines


def comparison_of(results: Sequence[SweepRunResult], folder: Path) -> list[str]:
    """Return a line with the command that compares the finished runs; none for a single one.

    `folder` is the sweep's, where the report will be.
    """
    finished = [result for result in results if result.status == "finished"]
    folders = [os.fspath(result.record.parent) for result in finished]
    command = ["foundry-ext", "compare", *folders, "--out", str(folder / "report")]
    return [f"compare: {shlex.join(command)}"] if len(finished) > 1 else []


def target_loss(record: Mapping[str, Any]) -> float | None:
    """Return the last loss on the first learning set, or None if it was not measured."""
    evaluations = record.get("evaluations")
    last = evaluations[-1] if isinstance(evaluations, list) and evaluations else None
    metrics = last.get("metrics") if isinstance(last, dict) else None
    sets = get(record, "config.callbacks.forgetting.sets")
    for name, entry in sets.items() if isinstance(sets, dict) else ():
        if get(entry, "role") == "learning" and isinstance(metrics, dict):
            loss = metrics.get(f"{name}/loss")
            if isinstance(loss, float) or (type(loss) is int and abs(loss) <= LARGEST_COUNT):
                return float(loss)
    return None


def duration(seconds: float) -> str:
    """Return a duration as `42 s`, `7 min` or `2 h 05 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
