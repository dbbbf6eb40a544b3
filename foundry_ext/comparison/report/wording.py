"""Numbers and lists as the report writes them."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from foundry_ext.comparison.comparison import Comparison
from foundry_ext.comparison.metrics import Metric
from foundry_ext.comparison.statistics import Interval

NONE = "–"


def with_limits(metric: Metric, mean: float, interval: Interval | None) -> str:
    shown = metric.show(mean)
    return f"{shown} {limits(metric, interval)}" if interval else shown


def limits(metric: Metric, interval: Interval, *, signed: bool = False) -> str:
    low, high = (metric.show(end, signed=signed) for end in (interval.low, interval.high))
    return f"[{low}, {high}]"


def seeds_used(comparison: Comparison) -> str:
    """E.g. "seeds 17, 18, 19, 120 items" """
    used = {label: tuple(run.seed for run in runs) for label, runs in comparison.chosen.items()}
    if len(set(used.values())) == 1:
        text = seed_list(next(iter(used.values())))
    else:
        text = "; ".join(f"{label}: {seed_list(seeds)}" for label, seeds in used.items())
    items = {
        one.metric.set_name: one.num_items
        for one in comparison.summaries
        if one.num_items and one.metric in (comparison.learning, comparison.forgetting)
    }
    counts = ", ".join(f"{count:,} items of {name}" for name, count in items.items())
    return f"{text}; {counts or 'no items'}"


def seed_list(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def spread(counts: Sequence[int]) -> str:
    """One count, or the least and the most."""
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def mean_or_none(values: Sequence[Any], form: str) -> str:
    known = [value for value in values if value is not None]
    return form.format(fmean(known)) if known else NONE


def mean_and_range(values: Sequence[Any], form: str) -> str:
    """The mean, and the least and the most where they are more than 10 % apart."""
    known = [value for value in values if value is not None]
    if not known or max(known) <= 1.1 * min(known):
        return mean_or_none(values, form)
    low, high = form.format(min(known)), form.format(max(known))
    return f"{mean_or_none(values, form)} ({low} to {high})"


def needed(number: int | None, used: int) -> str:
    """What a difference would need; a number below that used only says that it is enough."""
    if number is None:
        return NONE
    return f"≤ {used:,}" if number <= used else f"{number:,}"


def p_value(value: float | None) -> str:
    if value is None:
        return NONE
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
