"""What a sweep says: its size and cost before it starts, and a table at its end."""

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foundry_ext.sweeps.plan import Cost, Outcome
from foundry_ext.sweeps.state import read_outcome


def describe(
    name: str,
    statuses: Sequence[str],
    prices: Sequence[Cost],
    *,
    parallel: int,
    launcher: str,
    retry_failed: bool,
) -> list[str]:
    """What the sweep is and costs, before it starts.

    Args:
        statuses: of all runs.
        prices: of those to start.
    """
    parts = [f"{len(prices)} to start", f"{statuses.count('finished')} finished already"]
    if statuses.count("running"):
        parts.append(f"{statuses.count('running')} still running")
    if statuses.count("failed") and not retry_failed:
        num_failed = statuses.count("failed")
        parts.append(f"{num_failed} failed before (--retry-failed starts them again)")
    how = f"{parallel} at once, launcher {launcher}"
    lines = [f"sweep {name}: {len(statuses)} runs, {', '.join(parts)}; {how}"]
    if prices:
        lines.append(f"tokens: {_tokens_text(prices)}; time: {_time_text(prices, parallel)}")
    return lines


def _tokens_text(prices: Sequence[Cost]) -> str:
    known = [price.tokens for price in prices if price.tokens is not None]
    if len(known) < len(prices):
        unknown = len(prices) - len(known)
        return f"unknown until the data is read, for {unknown} of {len(prices)} runs"
    bound = "at most " if any(price.is_bound for price in prices) else ""
    return f"{bound}{sum(known):,.0f}"


def hours(prices: Sequence[Cost], parallel: int) -> float | None:
    """Of all runs together; None where one of them is unknown."""
    seconds = [price.seconds for price in prices if price.seconds is not None]
    if len(seconds) < len(prices):
        return None
    return sum(seconds) / min(parallel, max(1, len(seconds))) / 3600


def _time_text(prices: Sequence[Cost], parallel: int) -> str:
    estimate = hours(prices, parallel)
    if estimate is None and any(price.tokens is None for price in prices):
        return "unknown until the first runs have finished"
    if estimate is None:
        return "unknown, no finished run of each model and method to go by (--tokens-per-second)"
    return f"about {duration(estimate * 3600)}"


def summary(outcomes: Sequence[Outcome], report: Path) -> list[str]:
    """A table of all runs, and the command that compares them."""
    finished = [outcome for outcome in outcomes if outcome.status == "finished"]
    width = max(len(outcome.name) for outcome in outcomes)
    lines = [
        f"{len(finished)} of {len(outcomes)} runs finished",
        f"  {'run':<{width}}  {'status':<8}  {'target loss':>11}  {'time':>10}",
    ]
    for outcome in outcomes:
        loss = target_loss(read_outcome(outcome.record)) if outcome in finished else None
        loss_text = "-" if loss is None else f"{loss:.4f}"
        time_text = duration(outcome.seconds) if outcome.seconds else "-"
        lines.append(
            f"  {outcome.name:<{width}}  {outcome.status:<8}  {loss_text:>11}  {time_text:>10}"
        )
    if len(finished) > 1:
        folders = [os.fspath(outcome.record.parent) for outcome in finished]
        lines.append(f"compare: foundry-ext compare {shlex.join(folders)} --out {report}")
    return lines


def wall_seconds(record: Mapping[str, Any]) -> float:
    """Of the run so far, as its record says; 0 where it does not."""
    return float((record.get("time") or {}).get("wall_seconds") or 0.0)


def target_loss(record: Mapping[str, Any]) -> float | None:
    """The last loss on the first set of documents that the run is to learn, if it was measured."""
    evaluations = record.get("evaluations") or []
    config = record.get("config") or {}
    forgetting = (config.get("callbacks") or {}).get("forgetting") or {}
    for name, entry in (forgetting.get("sets") or {}).items():
        if entry.get("role") == "learning" and evaluations:
            loss = evaluations[-1]["metrics"].get(f"{name}/loss")
            if loss is not None:
                return float(loss)
    return None


def duration(seconds: float) -> str:
    """`42 s`, `7 min`, `2 h 05 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
