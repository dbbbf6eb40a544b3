"""The whole comparison as data: what the report's words, tables and plots are made from."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

from foundry_ext.comparison.comparability import check_comparable, distinguishing
from foundry_ext.comparison.learning_rates import (
    BestLearningRate,
    best_learning_rate,
    learning_measure,
)
from foundry_ext.comparison.measures import Measure, final_value, shared_measures
from foundry_ext.comparison.pairwise import Pair, Summary, compare_pairs, summarise
from foundry_ext.comparison.runs import Loaded, Run, by_label, labelled
from foundry_ext.comparison.statistics import MIN_SEEDS
from foundry_ext.comparison.tradeoff import Matched, levels, matched, matched_pairs, pareto_front


@dataclass(frozen=True)
class Point:
    """A method at one learning rate: the mean of its runs' ends."""

    label: str
    learning_rate: float
    learning: float
    forgetting: float
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Comparison:
    groups: Mapping[str, Sequence[Run]]
    """label -> all runs."""
    best: Mapping[str, BestLearningRate]
    chosen: Mapping[str, Sequence[Run]]
    """label -> the runs at the chosen learning rate, one a seed."""
    learning: Measure
    forgetting: Measure
    """The two that the trade-off is drawn in."""
    summaries: Sequence[Summary]
    pairs: Sequence[Pair]
    front: Sequence[Point]
    """By rising learning."""
    matched: Mapping[float, Mapping[str, Matched]]
    """learning level -> label -> forgetting there."""
    left_out: Mapping[str, str]
    diverged: Mapping[str, Sequence[Run]]
    """label -> its runs that diverged, which are in no mean."""
    accepted: Sequence[str]
    """Differences that --allow let pass."""

    @property
    def measures(self) -> list[Measure]:
        return list(dict.fromkeys(summary.measure for summary in self.summaries))

    def summary(self, label: str, measure: Measure) -> Summary:
        return next(one for one in self.summaries if one.label == label and one.measure == measure)

    def pairs_of(self, measure: Measure) -> list[Pair]:
        return [pair for pair in self.pairs if pair.measure == measure]

    @property
    def common_level(self) -> float | None:
        """The highest level of learning in `matched` that every run reaches."""
        complete = [
            level
            for level, methods in self.matched.items()
            if all(one.mean is not None for one in methods.values())
        ]
        return max(complete, default=None)

    @property
    def is_in_general(self) -> bool:
        """Whether every method has seeds enough for a claim about it."""
        return all(len(runs) >= MIN_SEEDS for runs in self.chosen.values())


def compare_runs(
    loaded: Loaded,
    *,
    allow: Sequence[str] = (),
    learning: str | None = None,
    forgetting: str | None = None,
) -> Comparison:
    """Groups runs by method, chooses each one's learning rate, and compares.

    Args:
        allow: dotted keys that may differ; see checks.py.
        learning, forgetting: keys of the records' `learning` and `forgetting` to draw the
            trade-off in, and to choose by; the first loss of each if not given.

    Raises:
        ValueError: runs that cannot be compared, or a measure they do not share.
    """
    accepted = check_comparable(loaded.runs, allow)
    runs = labelled(loaded.runs, distinguishing(loaded.runs))
    groups = by_label(runs)
    _refuse_copies(groups)
    learned = shared_measures(runs, "learning")
    forgotten = shared_measures(runs, "forgetting")
    x = _pick(learned, learning or learning_measure([run.record for run in runs]), "learning")
    y = _pick(forgotten, forgetting, "forgetting")
    diverged = {label: _alike(loaded.diverged, group[0]) for label, group in groups.items()}
    best = {
        label: best_learning_rate(
            [run.record for run in (*group, *diverged[label]) if x.key in run.final[x.role]], x.key
        )
        for label, group in groups.items()
    }
    chosen = {
        label: [run for run in group if run.learning_rate == best[label].learning_rate]
        for label, group in groups.items()
    }
    measures = [x, y, *(one for one in (*learned, *forgotten) if one not in (x, y))]
    return Comparison(
        groups=groups,
        best=best,
        chosen=chosen,
        learning=x,
        forgetting=y,
        summaries=[
            summarise(label, group, measure)
            for measure in measures
            for label, group in chosen.items()
        ],
        pairs=[pair for measure in measures for pair in compare_pairs(chosen, measure)],
        front=_front(groups, x, y),
        matched={
            level: {label: matched(chosen[label], groups[label], x, y, level) for label in groups}
            for level in levels(chosen, x)
        },
        left_out=loaded.left_out,
        diverged=diverged,
        accepted=accepted,
    )


def _alike(candidates: Sequence[Run], run: Run) -> list[Run]:
    """Those that are of the same group as `run`: but for learning rate and seed they are equal."""
    found = []
    for candidate in candidates:
        pair = [run, candidate]
        first, second = labelled(pair, distinguishing(pair))
        if first.label == second.label:
            found.append(candidate)
    return found


def points(groups: Mapping[str, Sequence[Run]], x: Measure, y: Measure) -> list[Point]:
    """Every method at every learning rate."""
    found = []
    for label, group in groups.items():
        for rate in sorted({run.learning_rate for run in group}):
            runs = [run for run in group if run.learning_rate == rate]
            learned, forgot = (fmean(final_value(run, one) for run in runs) for one in (x, y))
            found.append(Point(label, rate, learned, forgot, tuple(run.seed for run in runs)))
    return found


def beaten(comparison: Comparison) -> list[tuple[Point, Point]]:
    """Every method at its chosen learning rate that another one, at some learning rate, beats in
    both learning and forgetting; with that one which forgets least.

    Learning rates are chosen by learning alone, so this can be, whatever the chosen ones say.
    """
    every = points(comparison.groups, comparison.learning, comparison.forgetting)
    found = []
    for one in every:
        if one.learning_rate != comparison.best[one.label].learning_rate:
            continue
        better = [
            other
            for other in every
            if other.label != one.label
            and other.learning > one.learning
            and other.forgetting < one.forgetting
        ]
        if better:
            found.append((one, min(better, key=lambda other: other.forgetting)))
    return found


def _front(groups: Mapping[str, Sequence[Run]], x: Measure, y: Measure) -> list[Point]:
    every = points(groups, x, y)
    return [every[i] for i in pareto_front([(one.learning, one.forgetting) for one in every])]


def _pick(measures: Sequence[Measure], key: str | None, role: str) -> Measure:
    if not measures:
        raise ValueError(f"the runs have no measure of {role} in common")
    names = [measure.key for measure in measures]
    if key is not None and key not in names:
        raise ValueError(f"{key}: no measure of {role} that all runs have; {', '.join(names)}")
    return measures[names.index(key)] if key else measures[0]


def _refuse_copies(groups: Mapping[str, Sequence[Run]]) -> None:
    for label, group in groups.items():
        seen: dict[tuple[float, int], Run] = {}
        for run in group:
            other = seen.setdefault((run.learning_rate, run.seed), run)
            if other is not run:
                raise ValueError(
                    f"{other.name} and {run.name} are both {label} at learning rate"
                    f" {run.learning_rate:g} with seed {run.seed}: leave one out, or name what"
                    " tells them apart by --allow KEY"
                )


def write_json(path: Path, comparison: Comparison) -> None:
    """The figures of the report, in the records' units: accuracies are shares, not points."""
    data = {
        "schema_version": 1,
        "learning": comparison.learning.key,
        "forgetting": comparison.forgetting.key,
        "runs": {label: [run.name for run in group] for label, group in comparison.groups.items()},
        "left_out": comparison.left_out,
        "accepted_differences": comparison.accepted,
        "best_learning_rates": {
            label: {
                **asdict(best),
                "means": {f"{k:g}": v if isfinite(v) else None for k, v in best.means.items()},
            }
            for label, best in comparison.best.items()
        },
        "methods": [_plain(asdict(one)) for one in comparison.summaries],
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
            {"level": level, "methods": {label: asdict(one) for label, one in methods.items()}}
            for level, methods in comparison.matched.items()
        ],
        "matched_pairs": [
            {**asdict(pair), "distinguishable": pair.is_distinguishable}
            for pair in matched_pairs(comparison.matched.get(comparison.common_level or 0.0, {}))
        ],
    }
    path.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")


def _plain(data: dict[str, Any]) -> dict[str, Any]:
    return {**data, "measure": data["measure"]["key"], "role": data["measure"]["role"]}
