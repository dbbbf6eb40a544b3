"""The learning rate a method is compared at: the one it learns most with."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any


@dataclass(frozen=True)
class BestLearningRate:
    """The choice and what it rests on."""

    learning_rate: float
    measure: str
    """The `learning` key that decides, e.g. target_loss."""
    edge: str | None
    """"lowest" or "highest" where the best one lies at the grid's edge, so that a better one may
    lie beyond; None inside the grid, and where there is no grid."""
    means: Mapping[float, float]
    """learning rate -> mean learning over `seeds`; -inf where one of them diverged."""
    seeds: tuple[int, ...]
    """The seeds that decide: those that every learning rate was run with, so that a lucky seed
    favours none, and further seeds of the winner do not change the choice. Where there is no such
    seed, all of them."""


def best_learning_rate(
    records: Sequence[Mapping[str, Any]], measure: str | None = None
) -> BestLearningRate:
    """Chooses by mean final learning; of equals the lowest learning rate.

    A rate at which a run diverged is not chosen, unless there is none without such a run; then the
    other runs decide.

    Args:
        records: finished runs of one method, as in record.json.
        measure: a key of `learning`; the first loss if not given, or the first key.

    Raises:
        ValueError: no records, one without that measure, or nothing but diverged runs.
    """
    if not records:
        raise ValueError("no runs to choose a learning rate from")
    measure = measure or learning_measure(records)
    values: dict[float, dict[int, float]] = {}
    for record in records:
        learning = record["evaluations"][-1]["learning"]
        if measure not in learning:
            names = ", ".join(learning) or "nothing"
            raise ValueError(f"{record['run_name']}: no {measure} in its learning, but {names}")
        # A run that diverged has learned nothing, however its loss is written.
        learned = -math.inf if _has_diverged(record, measure) else learning[measure]
        values.setdefault(float(record["learning_rate"]), {})[record["seed"]] = learned
    shared = set.intersection(*map(set, values.values()))
    means = {
        rate: fmean(value for seed, value in by_seed.items() if seed in shared or not shared)
        for rate, by_seed in sorted(values.items())
    }
    best = max(means, key=lambda rate: means[rate])
    if means[best] == -math.inf:
        whole = [one for one in records if not _has_diverged(one, measure)]
        if whole:
            return best_learning_rate(whole, measure)
        raise ValueError(
            f"{records[0]['method']}: diverged at every learning rate, so none is best"
        )
    edge = None
    if len(means) > 1 and best in (min(means), max(means)):
        edge = "lowest" if best == min(means) else "highest"
    seeds = shared or set().union(*values.values())
    return BestLearningRate(best, measure, edge, means, tuple(sorted(seeds)))


def _has_diverged(record: Mapping[str, Any], measure: str) -> bool:
    end = record["evaluations"][-1]
    values = [end["learning"][measure], *end.get("forgetting", {}).values()]
    return not all(map(math.isfinite, values))


def learning_measure(records: Sequence[Mapping[str, Any]]) -> str:
    """The first held-out loss that all have learned on, else the first measure."""
    keys = [record["evaluations"][-1]["learning"] for record in records]
    shared = [key for key in keys[0] if all(key in others for others in keys)]
    if not shared:
        raise ValueError("the runs have no measure of learning in common")
    return next((key for key in shared if key.endswith("_loss")), shared[0])
