"""Check that runs differ only in method, learning rate, seed and names."""

from collections.abc import Mapping, Sequence
from typing import Any

from foundry_ext.comparison.fairness import ABSENT, Difference, differences, unequal_values
from foundry_ext.comparison.runs import Run
from foundry_ext.records.metric import KINDS, NATS
from foundry_ext.utils.errors import UserError
from foundry_ext.utils.nested import is_below

# Seeds may differ, because only those that two methods share are paired. Ranks make groups.
_ALWAYS_ALLOWED = ("seed", "model.peft_config.r")
_MOST_DIFFERENCES = 8  # that an error lists; runs of two experiments have hundreds
_LOSS_TOLERANCE = 1e-3  # relative, at step 0: rounding of another device
_ACCURACY_TOLERANCE = 5e-3  # absolute, at step 0
# Relative, in real tokens between seeds, because their packs fill differently: 1.1 % was seen over
# 80 packs. All methods have the same packs for a given seed, so this favours none of them.
_TOKENS_TOLERANCE = 0.03


def check_comparable(runs: Sequence[Run], allow: Sequence[str] = ()) -> list[str]:
    """Return the differences that `allow` accepts, as sentences for the report.

    Args:
        runs: the runs to compare.
        allow: dotted keys that may differ, each with all keys below it. They are keys of the
            configuration (train_loader, optimizer.weight_decay), or data, evaluation, steps,
            tokens, base, model.

    Raises:
        UserError: there are other differences; names them.
    """
    if len(runs) < 2:
        return []
    named = _named(runs)
    unequal = _unequal_results(named) + _unequal_settings(named)
    refused = [each for each in unequal if not any(is_below(each.key, key) for key in allow)]
    if refused:
        more = len(refused) - _MOST_DIFFERENCES
        raise UserError(
            "these runs differ in more than method, learning rate and seed: "
            + "; ".join(map(_sentence, refused[:_MOST_DIFFERENCES]))
            + (f"; and {more} more keys" if more > 0 else "")
            + ". Compare runs that agree, or accept a difference by --allow KEY"
        )
    return [_sentence(difference) for difference in unequal]


def distinguishing(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return key -> value per run of the keys in which their configurations differ.

    They tell groups of one method apart if --allow accepts the difference.
    """
    if len(runs) < 2:
        return [{} for _ in runs]
    named = _named(runs)
    differing = _unequal_settings(named)
    return [{each.key: each.values.get(name) for each in differing} for name in named]


def _unequal_settings(named: Mapping[str, Run]) -> list[Difference]:
    configs = {name: run.record["config"] for name, run in named.items()}
    defaults = {name: run.record.get("defaults") or {} for name, run in named.items()}
    return differences(configs, allow=_ALWAYS_ALLOWED, defaults=defaults)


def _named(runs: Sequence[Run]) -> dict[str, Run]:
    """Return runs by name, with a number after a name that several runs share."""
    named: dict[str, Run] = {}
    for run in runs:
        name, number = run.name, 1
        while name in named:
            number += 1
            name = f"{run.name} ({number})"
        named[name] = run
    return named


def _unequal_results(named: Mapping[str, Run]) -> list[Difference]:
    by_run = {name: _facts(run) for name, run in named.items()}
    unequal = []
    for key in dict.fromkeys(key for facts in by_run.values() for key in facts):
        unequal += unequal_values(
            key, {name: facts.get(key, ABSENT) for name, facts in by_run.items()}
        )
    return unequal + _unequal_tokens(named) + _unequal_base(named)


def _facts(run: Run) -> dict[str, Any]:
    """Return the facts of a record that must be exactly equal."""
    record = run.record
    data = record["data"]
    facts = {
        "data.train.fingerprint": data["train"]["fingerprint"],
        "steps": record["steps"],
        "model.name": record["model"]["name"],
        "model.parameters": _base_parameters(record["model"]),
        "evaluation.steps": [evaluation["step"] for evaluation in record["evaluations"]],
        "evaluation.measures": sorted([*run.final["learning"], *run.final["forgetting"]]),
    }
    for label, loader in sorted(data["eval"].items()):
        facts[f"data.eval.{label}.fingerprint"] = loader["fingerprint"]
    return facts


def _base_parameters(model: Mapping[str, Any]) -> int:
    """Return the number of parameters without the adapter's, which are the trainable ones."""
    return model["parameters"] - (model["trainable_parameters"] if model["rank"] else 0)


def _unequal_tokens(named: Mapping[str, Run]) -> list[Difference]:
    """Check that real tokens are equal for equal seeds, and within 3 % over seeds."""
    tokens = {name: run.record["tokens"]["real"] for name, run in named.items()}
    by_seed: dict[int, set[int]] = {}
    for name, run in named.items():
        by_seed.setdefault(run.seed, set()).add(tokens[name])
    within = all(len(values) == 1 for values in by_seed.values())
    if within and max(tokens.values()) <= min(tokens.values()) * (1 + _TOKENS_TOLERANCE):
        return []
    return [Difference("tokens.real", tokens)]


def _unequal_base(named: Mapping[str, Run]) -> list[Difference]:
    """Check that all runs start from the same values, which are the base model's."""
    unequal = []
    metrics = {
        name: {key: x for key, x in run.first["metrics"].items() if _kind(key) in KINDS}
        for name, run in named.items()
    }
    for key in dict.fromkeys(key for by_key in metrics.values() for key in by_key):
        values = {name: by_key[key] for name, by_key in metrics.items() if key in by_key}
        largest, smallest = max(values.values()), min(values.values())
        is_loss = _kind(key) in NATS
        allowed = _LOSS_TOLERANCE * max(1.0, abs(largest)) if is_loss else _ACCURACY_TOLERANCE
        if not largest - smallest <= allowed:
            rounded = {name: float(f"{value:.4g}") for name, value in values.items()}
            unequal.append(Difference(f"base.{key}", rounded))
    return unequal


def _kind(key: str) -> str:
    """Return the kind of a raw metric, <set>/<kind>."""
    return key.rpartition("/")[2]


def _sentence(difference: Difference) -> str:
    return difference.describe(most=3, form=str)
