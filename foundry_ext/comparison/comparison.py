"""Comparison of finished runs as data, from which the report's text, tables and plots are made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite

from foundry_ext.comparison.comparability import check_comparable, distinguishing
from foundry_ext.comparison.front_comparison import FrontComparison, compare_fronts
from foundry_ext.comparison.fronts import seed_points
from foundry_ext.comparison.learning_rates import BestLearningRate, best_learning_rate
from foundry_ext.comparison.matched_runs import MatchedRuns, compare_matched, with_grid_of
from foundry_ext.comparison.metrics import Metric, shared_metrics
from foundry_ext.comparison.pairwise import PairwiseComparison, Summary, compare_pairs, summarise
from foundry_ext.comparison.runs import Loaded, Run, by_label, labelled
from foundry_ext.comparison.statistics import MIN_SEEDS
from foundry_ext.comparison.tradeoff import (
    Matched,
    Point,
    matched,
    matching_levels,
    pareto_front,
    points,
)
from foundry_ext.utils.errors import UserError


@dataclass(frozen=True)
class Comparison:
    """All results of comparing runs, grouped by label: the method, and what tells groups apart."""

    groups: Mapping[str, Sequence[Run]]
    """label -> all its runs."""
    best: Mapping[str, BestLearningRate]
    chosen: Mapping[str, Sequence[Run]]
    """label -> its runs at the chosen learning rate, one per seed."""
    learning: Metric
    """Metric that learning rates are chosen by, and x of the trade-off."""
    forgetting: Metric
    """y of the trade-off."""
    summaries: Sequence[Summary]
    pairs: Sequence[PairwiseComparison]
    """Differences at the chosen rates; none if only runs at matched rates have enough seeds."""
    front: Sequence[Point]
    """Pareto front of all methods' means, by rising learning."""
    fronts: FrontComparison
    """Comparison of the methods' whole fronts over learning rates."""
    matched: Mapping[float, Mapping[str, Matched]]
    """learning level -> label -> forgetting at that level, along runs at the chosen rates."""
    at_matched_rates: MatchedRuns | None
    """Runs at rates chosen for equal learning, which are in no group; None if none were given."""
    left_out: Mapping[str, str]
    """run -> why it is not compared."""
    diverged: Mapping[str, Sequence[Run]]
    """label -> its runs that diverged, which no mean includes."""
    accepted: Sequence[str]
    """Differences that --allow accepted."""

    @property
    def runs(self) -> list[Run]:
        """All runs that count for fronts and best rates."""
        return [run for group in self.groups.values() for run in group]

    @property
    def all_runs(self) -> list[Run]:
        """All runs, with those at matched rates."""
        at_rates = self.at_matched_rates
        matched = (
            [] if at_rates is None else [run for group in at_rates.runs.values() for run in group]
        )
        return [*self.runs, *matched]

    @property
    def chosen_runs(self) -> list[Run]:
        """The runs at the chosen learning rates."""
        return [run for group in self.chosen.values() for run in group]

    @property
    def metrics(self) -> list[Metric]:
        """Metrics that all runs share."""
        return list(dict.fromkeys(summary.metric for summary in self.summaries))

    def summary(self, label: str, metric: Metric) -> Summary:
        """Return the summary of one metric over one group."""
        wanted = (label, metric)
        return next(each for each in self.summaries if (each.label, each.metric) == wanted)

    def pairs_of(self, metric: Metric) -> list[PairwiseComparison]:
        """Return all pairs in one metric."""
        return [pair for pair in self.pairs if pair.metric == metric]

    @property
    def common_level(self) -> float | None:
        """Highest level of learning in `matched` that every run reaches."""
        complete = [
            level
            for level, methods in self.matched.items()
            if all(method.mean is not None for method in methods.values())
        ]
        return max(complete, default=None)

    @property
    def is_in_general(self) -> bool:
        """True if every method has enough seeds for a claim about the method itself."""
        return all(len(runs) >= MIN_SEEDS for runs in self.chosen.values())


def compare_runs(
    loaded: Loaded,
    *,
    matched_runs: Sequence[Run] = (),
    allow: Sequence[str] = (),
    learning: str | None = None,
    forgetting: str | None = None,
    reference: float | None = None,
) -> Comparison:
    """Group runs by method, choose a learning rate per group, and compare the groups.

    Args:
        loaded: the runs.
        matched_runs: runs at learning rates that were chosen for equal learning; they are compared
            with each other only, and count neither for fronts nor for best rates.
        allow: dotted keys that may differ; see comparability.py.
        learning: key of the records' `learning` to choose learning rates by and to draw; by
            default the first loss.
        forgetting: key of the records' `forgetting` to draw; by default the first loss.
        reference: level of that forgetting, in the record's unit, up to which a front's area
            counts; by default chosen from all methods' fronts (`hypervolume.default_reference`).

    Raises:
        UserError: the runs cannot be compared, or do not share that metric, or the reference is
            not above 0.
    """
    if reference is not None and not (isfinite(reference) and reference > 0):
        raise UserError(f"reference {reference:g}: must be a level of forgetting above 0")
    runs = [*loaded.runs, *(with_grid_of(loaded.runs[0], run) for run in matched_runs)]
    accepted = check_comparable(runs, allow)
    runs = labelled(runs, distinguishing(runs))
    groups, at_matched = map(by_label, (runs[: len(loaded.runs)], runs[len(loaded.runs) :]))
    _refuse_copies(groups)
    _refuse_copies(at_matched)
    learned = shared_metrics(runs, "learning")
    forgotten = shared_metrics(runs, "forgetting")
    x = _pick(learned, learning, "learning")
    y = _pick(forgotten, forgetting, "forgetting")
    diverged = {label: _alike(loaded.diverged, group[0]) for label, group in groups.items()}
    best = {
        label: _best_learning_rate([*group, *diverged[label]], x) for label, group in groups.items()
    }
    chosen = {
        label: [run for run in group if run.learning_rate == best[label].learning_rate]
        for label, group in groups.items()
    }
    metrics = list(dict.fromkeys([x, y, *learned, *forgotten]))
    at_rates = compare_matched(at_matched, list(groups), metrics) if matched_runs else None
    fronts = _compare_fronts(groups, diverged, x, y, reference)
    pairs = [pair for metric in metrics for pair in compare_pairs(chosen, metric)]
    if at_rates is not None and at_rates.is_in_general:
        pairs, fronts = _with_enough_seeds(chosen, pairs, fronts)
    return Comparison(
        groups=groups,
        best=best,
        chosen=chosen,
        learning=x,
        forgetting=y,
        summaries=[
            summarise(label, group, metric) for metric in metrics for label, group in chosen.items()
        ],
        pairs=pairs,
        front=pareto_front(points(groups, x, y)),
        fronts=fronts,
        matched={
            level: {label: matched(chosen[label], groups[label], x, y, level) for label in groups}
            for level in matching_levels(chosen, x)
        },
        at_matched_rates=at_rates,
        left_out=loaded.left_out,
        diverged=diverged,
        accepted=accepted,
    )


def _with_enough_seeds(
    chosen: Mapping[str, Sequence[Run]],
    pairs: list[PairwiseComparison],
    fronts: FrontComparison,
) -> tuple[list[PairwiseComparison], FrontComparison]:
    """Return pairs and fronts without rankings that rest on fewer than three seeds.

    A seed decides which of two rates next to each other is the best one, and so what is forgotten
    there. If runs at matched rates have more seeds, only they rank methods.
    """
    if any(len(runs) < MIN_SEEDS for runs in chosen.values()):
        pairs = []
    if any(len(each.seeds) < MIN_SEEDS for each in fronts.points.values()):
        fronts = replace(fronts, area_pairs=[], level_pairs=[])
    return pairs, fronts


def _compare_fronts(
    groups: Mapping[str, Sequence[Run]],
    diverged: Mapping[str, Sequence[Run]],
    x: Metric,
    y: Metric,
    reference: float | None,
) -> FrontComparison:
    means = {label: points({label: group}, x, y) for label, group in groups.items()}
    return compare_fronts(seed_points(groups, diverged, x, y), means, reference)


def _best_learning_rate(runs: Sequence[Run], learning: Metric) -> BestLearningRate:
    records = [run.record for run in runs if learning.key in run.final[learning.role]]
    return best_learning_rate(records, learning.key)


def _alike(candidates: Sequence[Run], run: Run) -> list[Run]:
    """Return the candidates that belong to the same group as `run`."""

    def is_alike(candidate: Run) -> bool:
        pair = [run, candidate]
        first, second = labelled(pair, distinguishing(pair))
        return first.label == second.label

    return list(filter(is_alike, candidates))


def dominated_points(comparison: Comparison) -> list[tuple[Point, Point]]:
    """Return the chosen points that another method dominates, each with the point that does.

    A point dominates another if it learned more and forgot less. It may be at any learning rate of
    its method: rates are chosen by learning only, so the chosen points do not show this. Of several
    dominating points, the one that forgets least is returned.
    """
    candidates = points(comparison.groups, comparison.learning, comparison.forgetting)
    dominated = []
    for point in candidates:
        if point.learning_rate != comparison.best[point.label].learning_rate:
            continue
        better = [
            other
            for other in candidates
            if other.label != point.label
            and other.learning > point.learning
            and other.forgetting < point.forgetting
        ]
        if better:
            dominated.append((point, min(better, key=lambda other: other.forgetting)))
    return dominated


def _pick(metrics: Sequence[Metric], key: str | None, role: str) -> Metric:
    if not metrics:
        raise UserError(f"the runs have no metric of {role} in common")
    names = [metric.key for metric in metrics]
    if key is not None and key not in names:
        raise UserError(f"{key}: not a metric of {role} that all runs have: {', '.join(names)}")
    return metrics[names.index(key)] if key else metrics[0]


def _refuse_copies(groups: Mapping[str, Sequence[Run]]) -> None:
    for label, group in groups.items():
        seen: dict[tuple[float, int], Run] = {}
        for run in group:
            other = seen.setdefault((run.learning_rate, run.seed), run)
            if other is not run:
                raise UserError(
                    f"{other.name} and {run.name} are both {label} at learning rate"
                    f" {run.learning_rate:g} with seed {run.seed}: leave one out, or name what"
                    " tells them apart by --allow KEY"
                )
