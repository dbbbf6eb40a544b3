"""What is measured, per run and per item, as change against step 0.

Signs are the records': positive learning is more learned, positive forgetting more forgotten.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from foundry_ext.comparison.runs import Run

MEAN_ACCURACY = "mean_accuracy"
KINDS = ("strict_match", "flexible_extract", "acc_norm", "acc", "loss", "kl")
_CHOICE = ("acc", "acc_norm")


@dataclass(frozen=True)
class Measure:
    """One column of the records' `learning` or `forgetting`."""

    role: str
    """"learning" or "forgetting"."""
    key: str
    """As in the record, e.g. target_loss."""

    @property
    def kind(self) -> str:
        """loss, kl, acc, acc_norm, strict_match, flexible_extract; acc for the mean accuracy."""
        if self.key == MEAN_ACCURACY:
            return "acc"
        return next((kind for kind in KINDS if self.key.endswith(f"_{kind}")), "")

    @property
    def set_name(self) -> str:
        return self.key.removesuffix(f"_{self.kind}")

    @property
    def is_binary(self) -> bool:
        """Whether an item is right or wrong."""
        return self.kind in KINDS[:4] and self.key != MEAN_ACCURACY

    @property
    def unit(self) -> str:
        return "nats a token" if self.kind in ("loss", "kl") else "points"

    @property
    def scale(self) -> float:
        """Record's value -> shown value: accuracies in points of 100."""
        return 1.0 if self.kind in ("loss", "kl") else 100.0

    @property
    def subject(self) -> str:
        """E.g. "target (loss)"."""
        return "mean accuracy" if self.key == MEAN_ACCURACY else f"{self.set_name} ({self.kind})"

    @property
    def title(self) -> str:
        """E.g. "Learning: target (loss)"."""
        return f"{self.role.capitalize()}: {self.subject}"

    def show(self, value: float, *, signed: bool = False) -> str:
        """A value as the report writes it, without its unit."""
        digits = 1 if self.scale == 100 else 3
        shown = f"{value * self.scale:{'+' if signed else ''}.{digits}f}"
        return shown.replace("-", "−")


def shared_measures(runs: Sequence[Run], role: str) -> list[Measure]:
    """Those all runs have, losses first, then as in the records.

    Of acc and acc_norm a set's own `metric` is taken; the mean accuracy of a single set is that
    set's own, and left out.
    """
    keys = [key for key in runs[0].final[role] if all(key in run.final[role] for run in runs)]
    measures = [Measure(role, key) for key in keys]
    measures = [
        one
        for one in measures
        if one.kind not in _CHOICE
        or one.key == MEAN_ACCURACY
        or one.kind == _metric_of(runs[0], role, one.set_name)
    ]
    choices = [one for one in measures if one.kind in _CHOICE and one.key != MEAN_ACCURACY]
    if len(choices) == 1:
        measures = [one for one in measures if one.key != MEAN_ACCURACY]
    return sorted(measures, key=lambda one: one.kind != "loss")


def final_value(run: Run, measure: Measure) -> float:
    return float(run.final[measure.role][measure.key])


def curve(run: Run, measure: Measure) -> np.ndarray:
    """[evaluations, 2]: real tokens, value."""
    return np.array(
        [
            (evaluation["real_tokens"], evaluation[measure.role].get(measure.key, np.nan))
            for evaluation in run.record["evaluations"]
        ],
        dtype=np.float64,
    )


def item_changes(run: Run, measure: Measure) -> dict[str, tuple[float, float]]:
    """item -> (value, weight) with sum(values) / sum(weights) = the record's value; {} where the
    run has no such items."""
    if measure.key == MEAN_ACCURACY:
        return _mean_accuracy_items(run)
    before = run.by_set.get((run.first["step"], measure.set_name), {})
    after = run.by_set.get((run.final["step"], measure.set_name), {})
    kind = measure.kind
    found = {}
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
        sign = -1 if measure.role == "learning" else 1
        found[name] = (sign * float(value), float(line.get("tokens", 1)))
    return found


def _mean_accuracy_items(run: Run) -> dict[str, tuple[float, float]]:
    """Items of all forgetting multiple-choice sets, weighted so that every set counts the same."""
    sets: dict[str, dict[str, tuple[float, float]]] = {}
    for key in run.final["forgetting"]:
        measure = Measure("forgetting", key)
        if key == MEAN_ACCURACY or measure.kind not in _CHOICE:
            continue
        if measure.kind != _metric_of(run, "forgetting", measure.set_name):
            continue
        items = item_changes(run, measure)
        if not items:
            return {}
        sets[measure.set_name] = items
    total = sum(map(len, sets.values()))
    return {
        f"{name}/{item}": (value * total / (len(sets) * len(items)), 1.0)
        for name, items in sets.items()
        for item, (value, _) in items.items()
    }


def _metric_of(run: Run, role: str, set_name: str) -> str:
    """The metric that a multiple-choice set is configured to count by."""
    config: Any = run.record["config"]
    for part in ("callbacks", "forgetting", "sets", set_name, "metric"):
        config = config.get(part) if isinstance(config, Mapping) else None
    kinds = [kind for kind in _CHOICE if f"{set_name}_{kind}" in run.final[role]]
    return config if config in kinds else kinds[0]


def outcomes(run: Run, measure: Measure) -> dict[str, int]:
    """item -> 0 or 1 at the end of training, for a binary measure."""
    lines = run.by_set.get((run.final["step"], measure.set_name), {})
    return {name: int(line[measure.kind]) for name, line in lines.items() if measure.kind in line}


def item_matrix(
    groups: Sequence[Sequence[Run]], measure: Measure
) -> tuple[list[np.ndarray], np.ndarray] | None:
    """Values [S, I] of each group on the items that all their runs share, and weights [I].

    None where a run has no items, or where they do not make up its record's value: of another
    evaluation, or cut.
    """
    changes = [[item_changes(run, measure) for run in group] for group in groups]
    every = [one for group in changes for one in group]
    names = sorted(set(every[0]).intersection(*every[1:])) if every else []
    if len(names) < 2 or any(len(one) != len(names) for one in every):
        return None
    weights = np.array([every[0][name][1] for name in names])
    if any([one[name][1] for name in names] != weights.tolist() for one in every):
        return None
    matrices = [np.array([[one[name][0] for name in names] for one in group]) for group in changes]
    for group, matrix in zip(groups, matrices, strict=True):
        for run, values in zip(group, matrix, strict=True):
            if abs(values.sum() / weights.sum() - final_value(run, measure)) > 2e-3:
                return None
    return matrices, weights
