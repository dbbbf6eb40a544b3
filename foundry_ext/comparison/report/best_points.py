"""Table of the point that each method reaches at its best learning rate."""

from foundry_ext.comparison.comparison import Comparison
from foundry_ext.comparison.report.document import Table
from foundry_ext.comparison.report.wording import format_mean_and_interval, format_seeds_and_items


def best_point_table(comparison: Comparison) -> Table:
    """Return a row per method: its best learning rate, and what it learned and forgot there."""
    x, y = comparison.learning, comparison.forgetting
    rows = []
    for label in comparison.groups:
        summaries = [(metric, comparison.summary(label, metric)) for metric in (x, y)]
        rows.append(
            [
                label,
                f"{comparison.best[label].learning_rate:g}",
                *[format_mean_and_interval(metric, s.mean, s.interval) for metric, s in summaries],
            ]
        )
    return Table(
        ["the point at its best rate", "learning rate", "learned", "forgot"],
        rows,
        f"Learned: {x.subject}, {x.unit}; forgot: {y.subject}, {y.unit}. Means over seeds at the"
        " learning rate at which the method learns most, with 95 % intervals"
        f" ({format_seeds_and_items(comparison)}).",
    )
