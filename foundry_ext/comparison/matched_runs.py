"""Runs at learning rates that were chosen so that all methods learn the same.

A grid of rates under one seed shows at which rate each method reaches a level of learning; see
matched_rates.py. Runs at these rates, under several seeds, then compare forgetting at equal
learning. They are ends of runs, so nothing is interpolated between them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from foundry_ext.comparison.metrics import Metric
from foundry_ext.comparison.pairwise import PairwiseComparison, Summary, compare_pairs, summarise
from foundry_ext.comparison.runs import Run
from foundry_ext.comparison.statistics import MIN_SEEDS
from foundry_ext.utils.errors import UserError
from foundry_ext.utils.nested import get


@dataclass(frozen=True)
class MatchedRuns:
    """The comparison of all methods at their matched rates."""

    runs: Mapping[str, Sequence[Run]]
    """label -> its runs at its matched rate, one per seed."""
    summaries: Mapping[Metric, Sequence[Summary]]
    """metric -> one summary per method, in the order of `runs`."""
    pairs: Mapping[Metric, Sequence[PairwiseComparison]]
    """metric -> differences of every two methods, in the same order for all metrics."""

    @property
    def rates(self) -> dict[str, float]:
        """label -> the matched learning rate."""
        return {label: runs[0].learning_rate for label, runs in self.runs.items()}

    @property
    def is_in_general(self) -> bool:
        """True if every method has enough seeds for a claim about the method itself."""
        return all(len(runs) >= MIN_SEEDS for runs in self.runs.values())


def with_grid_of(grid_run: Run, run: Run) -> Run:
    """Return the matched run with the grid of learning rates that `grid_run` has.

    Methods are compared only if their grids have the same names. A matched rate comes from such a
    grid, but its YAML may have another one, that has the matched rate too or nothing else.
    """
    grid = get(grid_run.record["config"], "variables.learning_rates")
    variables = {**(run.record["config"].get("variables") or {}), "learning_rates": grid}
    return replace(
        run, record={**run.record, "config": {**run.record["config"], "variables": variables}}
    )


def compare_matched(
    runs: Mapping[str, Sequence[Run]],
    labels: Sequence[str],
    metrics: Sequence[Metric],
) -> MatchedRuns:
    """Compare the methods at their matched rates.

    Args:
        runs: label -> runs at the matched rate.
        labels: the methods that are compared over their grids.
        metrics: what to compare them in.

    Raises:
        UserError: a method has runs at several rates, or the methods are not those of the grids.
    """
    if set(runs) != set(labels):
        missing = [label for label in labels if label not in runs]
        missing += [label for label in runs if label not in labels]
        raise UserError(
            f"{', '.join(missing)}: give runs of the same methods with --matched and without it"
        )
    for label, group in runs.items():
        rates = sorted({run.learning_rate for run in group})
        if len(rates) > 1:
            values = ", ".join(f"{rate:g}" for rate in rates)
            raise UserError(
                f"{label} has --matched runs at {values}: give those at one learning rate, at which"
                " it learns as much as the other methods"
            )
    ordered = {label: runs[label] for label in labels}
    return MatchedRuns(
        runs=ordered,
        summaries={
            metric: [summarise(label, group, metric) for label, group in ordered.items()]
            for metric in metrics
        },
        pairs={metric: compare_pairs(ordered, metric) for metric in metrics},
    )
