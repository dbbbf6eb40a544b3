"""Formats of numbers and lists in the report."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from foundry_ext.comparison.comparison import Comparison
from foundry_ext.comparison.metrics import Metric
from foundry_ext.comparison.statistics import MIN_SEEDS, Interval, over_seeds

NO_VALUE = "–"


def format_mean_and_interval(metric: Metric, mean: float, interval: Interval | None) -> str:
    """Return e.g. "3.871 [3.823, 3.919]", or the mean alone."""
    shown = metric.show(mean)
    return f"{shown} {metric.show_limits(interval.low, interval.high)}" if interval else shown


def format_seeds_and_items(comparison: Comparison) -> str:
    """Return what the chosen runs are measured on: "seeds 17, 18; 120 items of target"."""
    used = {label: tuple(run.seed for run in runs) for label, runs in comparison.chosen.items()}
    if len(set(used.values())) == 1:
        text = format_seeds(next(iter(used.values())))
    else:
        text = "; ".join(f"{label}: {format_seeds(seeds)}" for label, seeds in used.items())
    items = {
        summary.metric.set_name: summary.num_items
        for summary in comparison.summaries
        if summary.num_items and summary.metric in (comparison.learning, comparison.forgetting)
    }
    counts = ", ".join(f"{count:,} items of {name}" for name, count in items.items())
    return f"{text}; {counts or 'no items'}"


def format_seeds(seeds: Sequence[int]) -> str:
    """Return e.g. "seeds 17, 18"."""
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def join_names(names: Sequence[str]) -> str:
    """Return e.g. "full, LoRA and DoRA"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def format_range(counts: Sequence[int]) -> str:
    """Return the count if all are equal, else the smallest and the largest."""
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def format_mean(values: Sequence[Any], form: str) -> str:
    """Return the mean of the values that are not None, or a dash if there are none."""
    known = [value for value in values if value is not None]
    return form.format(fmean(known)) if known else NO_VALUE


def format_mean_over_seeds(values: Sequence[Any], form: str) -> str:
    """Return the mean of the values that are not None, with a t interval if there are enough."""
    known = [float(value) for value in values if value is not None]
    if len(known) < MIN_SEEDS:
        return format_mean_and_range(known, form)
    interval = over_seeds(known)
    low, high = form.format(interval.low), form.format(interval.high)
    return f"{format_mean(known, form)} [{low}, {high}]".replace("[-", "[−")


def format_mean_and_range(values: Sequence[Any], form: str) -> str:
    """Return the mean, and the range if it is wider than 10 %."""
    known = [value for value in values if value is not None]
    if not known or max(known) <= 1.1 * min(known):
        return format_mean(values, form)
    low, high = form.format(min(known)), form.format(max(known))
    return f"{format_mean(values, form)} ({low} to {high})"


def format_needed(count: int | None, used: int) -> str:
    """Return how many seeds or items a difference needs.

    A count up to `used` is shown as "≤ used", because it only says that those were enough.
    """
    if count is None:
        return NO_VALUE
    return f"≤ {used:,}" if count <= used else f"{count:,}"


def format_p_value(value: float | None) -> str:
    """Return a p-value to three decimals, or a dash if there is none."""
    if value is None:
        return NO_VALUE
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def format_p(value: float | None) -> str:
    """Return e.g. "p = 0.047" or "p < 0.001"."""
    shown = format_p_value(value)
    return f"p {shown}" if shown.startswith("<") else f"p = {shown}"
