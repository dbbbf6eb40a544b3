"""Figures of evaluation sets, and learning and forgetting computed from them.

Learning is positive if the run learned more, forgetting if it forgot more, both against step 0.
Plain numbers: this module imports neither torch nor a trainer.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from foundry_ext.evaluation.config import EvalSetConfig, MultipleChoiceSetConfig

Item = dict[str, Any]

_ACCURACIES = ("acc", "acc_norm", "strict_match", "flexible_extract")
_RISING = (*_ACCURACIES, "logprob")  # higher is better


def set_metrics(items: Sequence[Item]) -> dict[str, float]:
    """Return one set's figures.

    Documents have loss and KL in mean nats per labelled token; other sets have accuracies, 0 to 1.
    Multiple choice may also have the mean log-probability of the right choice, in nats.
    """
    assert items, "a set without items"
    if "loss" in items[0]:
        tokens = sum(item["tokens"] for item in items)
        names = ("loss", "kl") if "kl" in items[0] else ("loss",)
        return {name: sum(item[name] for item in items) / tokens for name in names}
    names = [name for name in _RISING if name in items[0]]
    return {name: sum(item[name] for item in items) / len(items) for name in names}


def changes(
    configs: Iterable[EvalSetConfig], start: Mapping[str, float], now: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """Return what was learned and forgotten between figures at step 0 and now.

    Example: {"learning": {"target_loss": ...}, "forgetting": {"source_kl": ..., "mean_accuracy":
    ...}} of figures by `<set>/<metric>`.
    """
    result: dict[str, dict[str, float]] = {"learning": {}, "forgetting": {}}
    lost_accuracies = []
    for config in configs:
        name, role = config.name, config.role
        for key, value in now.items():
            metric = key.removeprefix(f"{name}/")
            if metric == key:
                continue
            if metric == "kl" and role == "forgetting":
                result[role][f"{name}_kl"] = value  # already a distance from the base model
            elif metric == "loss" or metric in _RISING:
                # Learning: the loss falls, all others rise. Forgetting: the reverse.
                rises = (role == "learning") == (metric != "loss")
                change = value - start[key] if rises else start[key] - value
                result[role][f"{name}_{metric}"] = change
        if role == "forgetting" and isinstance(config, MultipleChoiceSetConfig):
            lost_accuracies.append(result[role][f"{name}_{config.metric}"])
    if lost_accuracies:
        result["forgetting"]["mean_accuracy"] = sum(lost_accuracies) / len(lost_accuracies)
    return result
