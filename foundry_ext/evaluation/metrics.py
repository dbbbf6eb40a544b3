"""Items -> figures -> learning and forgetting. Plain numbers: no torch, no trainer.

Positive learning: learned more. Positive forgetting: forgot more. Both against step 0.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from foundry_ext.evaluation.config import MultipleChoiceSettings, SetSettings

Item = dict[str, Any]

# Lower is better for the first, which so changes sign against the accuracies.
_LOSS = "loss"
_ACCURACIES = ("acc", "acc_norm", "strict_match", "flexible_extract")


def set_metrics(items: Sequence[Item]) -> dict[str, float]:
    """Of one set's items: mean nats a labelled token (documents), or shares of right answers."""
    assert items, "a set without items"
    if "loss" in items[0]:
        tokens = sum(item["tokens"] for item in items)
        kinds = ("loss", "kl") if "kl" in items[0] else ("loss",)
        return {kind: sum(item[kind] for item in items) / tokens for kind in kinds}
    found = [name for name in _ACCURACIES if name in items[0]]
    return {name: sum(item[name] for item in items) / len(items) for name in found}


def changes(
    sets: Iterable[SetSettings], start: Mapping[str, float], now: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """{"learning": {"target_loss": ...}, "forgetting": {"source_kl": ..., "mean_accuracy": ...}}.

    Args:
        start, now: figures at step 0 and now, by `<set>/<metric>`.
    """
    found: dict[str, dict[str, float]] = {"learning": {}, "forgetting": {}}
    lost_accuracy = []
    for settings in sets:
        name, role = settings.name, settings.role
        learns = role == "learning"
        for key, value in now.items():
            metric = key.removeprefix(f"{name}/")
            if metric == key:
                continue
            if metric == _LOSS:
                found[role][f"{name}_loss"] = start[key] - value if learns else value - start[key]
            elif metric == "kl" and role == "forgetting":
                found[role][f"{name}_kl"] = value  # against the base model already
            elif metric in _ACCURACIES:
                found[role][f"{name}_{metric}"] = (
                    value - start[key] if learns else start[key] - value
                )
        if role == "forgetting" and isinstance(settings, MultipleChoiceSettings):
            lost_accuracy.append(found[role][f"{name}_{settings.metric}"])
    if lost_accuracy:
        found["forgetting"]["mean_accuracy"] = sum(lost_accuracy) / len(lost_accuracy)
    return found
