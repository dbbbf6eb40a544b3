"""Values as they were measured, before training and at its end; other tables give changes."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from foundry_ext.comparison.comparison import Comparison
from foundry_ext.comparison.metrics import measured_items
from foundry_ext.comparison.report.document import Block, Heading, Paragraph, Table
from foundry_ext.comparison.report.wording import NO_VALUE
from foundry_ext.comparison.runs import Run
from foundry_ext.comparison.statistics import (
    MIN_SEEDS,
    Interval,
    bootstrap_items,
    over_seeds,
    seeds_and_items,
)

_UNITS = {
    **{"loss": "nats per token", "kl": "nats per token", "logprob": "nats per answer"},
    **{"acc": "share right", "acc_norm": "share right"},
}


def value_blocks(comparison: Comparison) -> list[Block]:
    """Return the section with every set's value of the base model and of each method."""
    chosen = comparison.chosen
    first = comparison.chosen_runs[0]
    rows = []
    for key in _measured(first.first, first.final):
        unit = _UNITS.get(key.rpartition("/")[2], "")
        ends = [_shown([(run, run.final) for run in runs], key) for runs in chosen.values()]
        name = f"{key}, {unit}" if unit else key
        rows.append([name, _shown([(first, first.first)], key), *ends])
    return [
        Heading("Values"),
        Paragraph(
            "What the sets measured; all other sections give changes. A lower loss, or a higher"
            " accuracy or log-probability, means that the model knows the set better. KL is the"
            " distance from the base model. A model that guesses has a loss of the logarithm of its"
            " vocabulary's size, and an accuracy of one over the number of choices."
        ),
        Table(
            ["at the end", "base model", *chosen],
            rows,
            "Means over seeds at the chosen learning rates, with 95 % intervals: over items, and"
            f" also over seeds if there are {MIN_SEEDS}. The base model is measured at step 0. The"
            " items are the same for all, so differences vary less than these values do.",
        ),
    ]


def _measured(start: Mapping[str, Any], end: Mapping[str, Any]) -> list[str]:
    """Return the metrics of sets with a role, without those of Composer's own evaluators."""
    with_role = {*end["learning"], *end["forgetting"]}
    keys = [key for key in start["metrics"] if key in end["metrics"]]
    return [key for key in keys if key.replace("/", "_") in with_role]


def _shown(measured: Sequence[tuple[Run, Mapping[str, Any]]], key: str) -> str:
    """Return the mean of a metric over (run, evaluation), with its interval."""
    values = [evaluation["metrics"].get(key) for _, evaluation in measured]
    if None in values:
        return NO_VALUE
    interval = _interval(values, [measured_items(*each, key) for each in measured])
    shown = f"{fmean(values):.3f}"
    if interval is not None:
        shown += f" [{interval.low:.3f}, {interval.high:.3f}]"
    return shown.replace("-", "−")


def _interval(
    values: Sequence[float], items: Sequence[Mapping[str, tuple[float, float]]]
) -> Interval | None:
    names = sorted(items[0])
    if len(names) < 2 or any(sorted(each) != names for each in items):
        return over_seeds(values) if len(values) >= MIN_SEEDS else None
    weights = np.array([items[0][name][1] for name in names])
    matrix = np.array([[each[name][0] for name in names] for each in items])
    if len(values) >= MIN_SEEDS:
        return seeds_and_items(matrix, weights)
    return bootstrap_items(matrix.mean(0), weights)
