"""The learning rate that a method is compared at: the one at which it learns most."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any


@dataclass(frozen=True)
class BestLearningRate:
    """A method's chosen learning rate and the reasons for the choice."""

    learning_rate: float
    metric: str
    """The `learning` key it was chosen by, e.g. target_loss."""
    edge: str | None
    """"lowest" or "highest" if the choice lies at the edge of the grid, because a better rate may
    lie beyond it. None inside the grid, and if there is only one rate."""
    means: Mapping[float, float]
    """learning rate -> mean learning over `seeds`; -inf if one of those runs diverged."""
    seeds: tuple[int, ...]
    """Seeds that every learning rate was run with, or all seeds if there is no such seed. A lucky
    seed therefore favours no rate, and further seeds of the winner do not change the choice."""


def best_learning_rate(
    records: Sequence[Mapping[str, Any]], metric: str | None = None
) -> BestLearningRate:
    """Choose the learning rate with the highest mean final learning; the lowest of equals.

    A rate at which a run diverged is not chosen. If a run diverged at every rate, the other runs
    decide.

    Args:
        records: finished runs of one method, as in record.json.
        metric: a key of `learning`; by default the first loss, or the first key.

    Raises:
        ValueError: there are no records, one lacks the metric, or all runs diverged.
    """
    if not records:
        raise ValueError("no runs to choose a learning rate from")
    metric = metric or learning_metric(records)
    values: dict[float, dict[int, float]] = {}
    for record in records:
        learning = record["evaluations"][-1]["learning"]
        if metric not in learning:
            names = ", ".join(learning) or "nothing"
            raise ValueError(f"{record['run_name']}: no {metric} in its learning, but {names}")
        # A run that diverged has learned nothing, whatever number its loss is.
        learned = -math.inf if _has_diverged(record, metric) else learning[metric]
        values.setdefault(float(record["learning_rate"]), {})[record["seed"]] = learned
    shared = set.intersection(*map(set, values.values()))
    means = {
        rate: fmean(value for seed, value in by_seed.items() if seed in shared or not shared)
        for rate, by_seed in sorted(values.items())
    }
    best = max(means, key=lambda rate: means[rate])
    if means[best] == -math.inf:
        converged = [record for record in records if not _has_diverged(record, metric)]
        if converged:
            return best_learning_rate(converged, metric)
        raise ValueError(
            f"{records[0]['method']}: diverged at every learning rate, so none is best"
        )
    edge = None
    if len(means) > 1 and best in (min(means), max(means)):
        edge = "lowest" if best == min(means) else "highest"
    seeds = shared or set().union(*values.values())
    return BestLearningRate(best, metric, edge, means, tuple(sorted(seeds)))


def _has_diverged(record: Mapping[str, Any], metric: str) -> bool:
    end = record["evaluations"][-1]
    values = [end["learning"][metric], *end.get("forgetting", {}).values()]
    return not all(map(math.isfinite, values))


def learning_metric(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the first held-out loss that all records have under `learning`, else the first key."""
    keys = [record["evaluations"][-1]["learning"] for record in records]
    shared = [key for key in keys[0] if all(key in others for others in keys)]
    if not shared:
        raise ValueError("the runs have no metric of learning in common")
    return next((key for key in shared if key.endswith("_loss")), shared[0])
