"""Comparison of finished runs as data, from which the report's text, tables and plots are made."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from foundry_ext.comparison.comparability import check_comparable, distinguishing
from foundry_ext.comparison.learning_rates import BestLearningRate, best_learning_rate
from foundry_ext.comparison.metrics import Metric, shared_metrics
from foundry_ext.comparison.pairwise import PairwiseComparison, Summary, compare_pairs, summarise
from foundry_ext.comparison.runs import Loaded, Run, by_label, labelled
from foundry_ext.comparison.statistics import MIN_SEEDS
from foundry_ext.comparison.tradeoff import (
    Matched,
    Point,
    matched,
    matched_pairs,
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
    front: Sequence[Point]
    """Pareto front, by rising learning."""
    matched: Mapping[float, Mapping[str, Matched]]
    """learning level -> label -> forgetting at that level."""
    left_out: Mapping[str, str]
    """run -> why it is not compared."""
    diverged: Mapping[str, Sequence[Run]]
    """label -> its runs that diverged, which no mean includes."""
    accepted: Sequence[str]
    """Differences that --allow accepted."""

    @property
    def runs(self) -> list[Run]:
        """All runs."""
        return [run for group in self.groups.values() for run in group]

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
    allow: Sequence[str] = (),
    learning: str | None = None,
    forgetting: str | None = None,
) -> Comparison:
    """Group runs by method, choose a learning rate per group, and compare the groups.

    Args:
        loaded: the runs.
        allow: dotted keys that may differ; see comparability.py.
        learning: key of the records' `learning` to choose learning rates by and to draw; by
            default the first loss.
        forgetting: key of the records' `forgetting` to draw; by default the first loss.

    Raises:
        UserError: the runs cannot be compared, or do not share that metric.
    """
    accepted = check_comparable(loaded.runs, allow)
    runs = labelled(loaded.runs, distinguishing(loaded.runs))
    groups = by_label(runs)
    _refuse_copies(groups)
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
    return Comparison(
        groups=groups,
        best=best,
        chosen=chosen,
        learning=x,
        forgetting=y,
        summaries=[
            summarise(label, group, metric) for metric in metrics for label, group in chosen.items()
        ],
        pairs=[pair for metric in metrics for pair in compare_pairs(chosen, metric)],
        front=pareto_front(points(groups, x, y)),
        matched={
            level: {label: matched(chosen[label], groups[label], x, y, level) for label in groups}
            for level in matching_levels(chosen, x)
        },
        left_out=loaded.left_out,
        diverged=diverged,
        accepted=accepted,
    )


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


def write_json(path: Path, comparison: Comparison) -> None:
    """Write the report's numbers in the records' units: accuracies are shares, not points."""
    data = {
        "schema_version": 1,
        "learning": comparison.learning.key,
        "forgetting": comparison.forgetting.key,
        "runs": {label: [run.name for run in group] for label, group in comparison.groups.items()},
        "left_out": comparison.left_out,
        "accepted_differences": comparison.accepted,
        "best_learning_rates": {
            label: {
                **_as_measure(asdict(best)),
                "means": {f"{k:g}": v if isfinite(v) else None for k, v in best.means.items()},
            }
            for label, best in comparison.best.items()
        },
        "methods": [_plain(asdict(summary)) for summary in comparison.summaries],
        "pairs": [
            {
                **_plain(asdict(pair)),
                "p": pair.p,
                "distinguishable": pair.is_distinguishable,
                "sentence": pair.sentence,
            }
            for pair in comparison.pairs
        ],
        "pareto_front": [asdict(point) for point in comparison.front],
        "matched_learning": [
            {"level": level, "methods": {label: asdict(at) for label, at in methods.items()}}
            for level, methods in comparison.matched.items()
        ],
        "matched_pairs": [
            {**asdict(pair), "distinguishable": pair.is_distinguishable}
            for pair in matched_pairs(comparison.matched.get(comparison.common_level or 0.0, {}))
        ],
    }
    path.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _plain(data: dict[str, Any]) -> dict[str, Any]:
    metric = data["metric"]
    return {**_as_measure(data), "measure": metric["key"], "role": metric["role"]}


def _as_measure(data: dict[str, Any]) -> dict[str, Any]:
    """Rename `metric` to `measure`, its key in the files that users have."""
    return {"measure" if key == "metric" else key: value for key, value in data.items()}
