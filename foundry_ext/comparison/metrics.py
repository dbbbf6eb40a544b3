"""Learning and forgetting metrics, per run and per item, as change since step 0.

Signs are the same as in records: positive learning means more learned, positive forgetting more
forgotten.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from foundry_ext.comparison.runs import Run
from foundry_ext.records.metric import MEAN_ACCURACY, Metric
from foundry_ext.utils.nested import get

_CHOICE = ("acc", "acc_norm")
_ROUNDING = 2e-3  # of a record's value against the mean of its items


def shared_metrics(runs: Sequence[Run], role: str) -> list[Metric]:
    """Return the metrics that all runs have: losses first, then in the records' order.

    Only one of acc and acc_norm is returned for a set, the one that its `metric` names. The mean
    accuracy is left out if there is a single set, because it equals that set's accuracy.
    """
    keys = [key for key in runs[0].final[role] if all(key in run.final[role] for run in runs)]
    metrics = [Metric(role, key) for key in keys]
    metrics = [
        metric
        for metric in metrics
        if metric.kind not in _CHOICE
        or metric.key == MEAN_ACCURACY
        or metric.kind == _configured_kind(runs[0], role, metric.set_name)
    ]
    accuracies = [metric for metric in metrics if metric.kind in _CHOICE]
    if sum(metric.key != MEAN_ACCURACY for metric in accuracies) == 1:
        metrics = [metric for metric in metrics if metric.key != MEAN_ACCURACY]
    return sorted(metrics, key=lambda metric: metric.kind != "loss")


def final_value(run: Run, metric: Metric) -> float:
    """Return the metric at the end of training."""
    return float(run.final[metric.role][metric.key])


def curve(run: Run, metric: Metric) -> np.ndarray:
    """Return [evaluations, 2]: real tokens and value; NaN where an evaluation lacks the metric."""
    return np.array(
        [
            (evaluation["real_tokens"], evaluation[metric.role].get(metric.key, np.nan))
            for evaluation in run.record["evaluations"]
        ],
        dtype=np.float64,
    )


def item_changes(run: Run, metric: Metric) -> dict[str, tuple[float, float]]:
    """Return item -> (value, weight), with sum(values) / sum(weights) equal to the record's value.

    The result is empty if the run has no such items.
    """
    if metric.key == MEAN_ACCURACY:
        return _mean_accuracy_items(run)
    before = run.by_set.get((run.first["step"], metric.set_name), {})
    after = run.by_set.get((run.final["step"], metric.set_name), {})
    kind = metric.kind
    changes = {}
    for name, line in after.items():
        start = before.get(name)
        if kind not in line or start is None or (kind != "kl" and kind not in start):
            return {}
        if kind == "kl":
            value = line["kl"]
        elif kind == "loss":
            value = line["loss"] - start["loss"]
        else:
            value = start[kind] - line[kind]
        sign = -1 if metric.role == "learning" else 1
        changes[name] = (sign * float(value), float(line.get("tokens", 1)))
    return changes


def measured_items(
    run: Run, evaluation: Mapping[str, Any], key: str
) -> dict[str, tuple[float, float]]:
    """Return item -> (value, weight) of one evaluation's metric, such as target/loss.

    sum(values) / sum(weights) is the record's value. The result is empty if the run has no such
    items.
    """
    name, _, kind = key.rpartition("/")
    lines = run.by_set.get((evaluation["step"], name), {})
    if not all(kind in line for line in lines.values()):
        return {}
    items = {item: (float(x[kind]), float(x.get("tokens", 1))) for item, x in lines.items()}
    total = sum(weight for _, weight in items.values())
    mean = sum(value for value, _ in items.values()) / total if total else np.inf
    return items if abs(mean - evaluation["metrics"][key]) <= _ROUNDING else {}


def _mean_accuracy_items(run: Run) -> dict[str, tuple[float, float]]:
    """Return the items of all forgetting multiple-choice sets, weighting all sets equally."""
    sets: dict[str, dict[str, tuple[float, float]]] = {}
    for key in run.final["forgetting"]:
        metric = Metric("forgetting", key)
        if key == MEAN_ACCURACY or metric.kind not in _CHOICE:
            continue
        if metric.kind != _configured_kind(run, "forgetting", metric.set_name):
            continue
        items = item_changes(run, metric)
        if not items:
            return {}
        sets[metric.set_name] = items
    total = sum(map(len, sets.values()))
    return {
        f"{name}/{item}": (value * total / (len(sets) * len(items)), 1.0)
        for name, items in sets.items()
        for item, (value, _) in items.items()
    }


def _configured_kind(run: Run, role: str, set_name: str) -> str:
    """Return the `metric` that a multiple-choice set is configured with."""
    sets = get(run.record["config"], "callbacks.forgetting.sets") or {}
    configured = get(sets.get(set_name), "metric")
    kinds = [kind for kind in _CHOICE if f"{set_name}_{kind}" in run.final[role]]
    return configured if configured in kinds else kinds[0]


def outcomes(run: Run, metric: Metric) -> dict[str, int]:
    """Return item -> 0 or 1 at the end of training, for a binary metric."""
    lines = run.by_set.get((run.final["step"], metric.set_name), {})
    return {name: int(line[metric.kind]) for name, line in lines.items() if metric.kind in line}


def item_matrix(
    groups: Sequence[Sequence[Run]], metric: Metric
) -> tuple[list[np.ndarray], np.ndarray] | None:
    """Return the values [S, I] of each group's runs on the items they all share, and weights [I].

    Returns:
        None if a run has no items, or if its items do not add up to its record's value because
        they belong to another evaluation or are incomplete.
    """
    changes = [[item_changes(run, metric) for run in group] for group in groups]
    all_items = [items for group in changes for items in group]
    names = sorted(set(all_items[0]).intersection(*all_items[1:])) if all_items else []
    if len(names) < 2 or any(len(items) != len(names) for items in all_items):
        return None
    weights = np.array([all_items[0][name][1] for name in names])
    if any([items[name][1] for name in names] != weights.tolist() for items in all_items):
        return None
    matrices = [
        np.array([[items[name][0] for name in names] for items in group]) for group in changes
    ]
    for group, matrix in zip(groups, matrices, strict=True):
        for run, values in zip(group, matrix, strict=True):
            if abs(values.sum() / weights.sum() - final_value(run, metric)) > _ROUNDING:
                return None
    return matrices, weights
