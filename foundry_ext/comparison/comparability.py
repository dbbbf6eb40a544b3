"""Refuses to compare runs that differ in more than method, learning rate, seed and names."""

from collections.abc import Mapping, Sequence
from typing import Any

from foundry_ext.comparison.fairness import Difference, differences
from foundry_ext.comparison.measures import KINDS
from foundry_ext.comparison.runs import Run

# Seeds need not be the same: only those that two methods share are paired. Ranks make groups.
_ALWAYS = ("seed", "model.peft_config.r")
_NAMED = 8  # differences written out; runs of two experiments have hundreds
_RELATIVE = 1e-3  # step-0 losses, relative: another device's rounding
_ACCURACY = 5e-3  # step-0 accuracies, absolute
# Real tokens between seeds, whose packs fill differently: 1.1 % was seen over 80 packs. Methods of
# one seed have the same packs, so that this favours none.
_TOKENS = 0.03


def check_comparable(runs: Sequence[Run], allow: Sequence[str] = ()) -> list[str]:
    """The differences that `allow` accepts, as sentences for the report.

    Args:
        allow: dotted keys, each with all below it: of the configuration (train_loader,
            optimizer.weight_decay), or data, evaluation, steps, tokens, base, model.

    Raises:
        ValueError: names every other difference.
    """
    if len(runs) < 2:
        return []
    found = [*_of_results(runs)]
    configs = {name: run.record["config"] for name, run in _named(runs).items()}
    found += differences(configs, allow=_ALWAYS)
    refused = [one for one in found if not any(_is_below(one.key, key) for key in allow)]
    if refused:
        raise ValueError(
            "these runs differ in more than method, learning rate and seed: "
            + "; ".join(_sentence(one) for one in refused[:_NAMED])
            + (f"; and {len(refused) - _NAMED} more keys" if len(refused) > _NAMED else "")
            + ". Compare runs that agree, or accept a difference by --allow KEY"
        )
    return [_sentence(one) for one in found]


def distinguishing(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Of each run, key -> value of what differs between their configurations, to tell groups of
    one method apart where --allow accepts it."""
    if len(runs) < 2:
        return [{} for _ in runs]
    named = _named(runs)
    found = differences({name: run.record["config"] for name, run in named.items()}, allow=_ALWAYS)
    return [{one.key: one.values.get(name) for one in found} for name in named]


def _named(runs: Sequence[Run]) -> dict[str, Run]:
    """Runs by name; a name that several share gets a number."""
    named: dict[str, Run] = {}
    for run in runs:
        name, number = run.name, 1
        while name in named:
            number += 1
            name = f"{run.name} ({number})"
        named[name] = run
    return named


def _of_results(runs: Sequence[Run]) -> list[Difference]:
    named = _named(runs)
    facts = {name: _facts(run) for name, run in named.items()}
    found = []
    for key in dict.fromkeys(key for own in facts.values() for key in own):
        values = {name: own.get(key, "(absent)") for name, own in facts.items()}
        if len({str(value) for value in values.values()}) > 1:
            found.append(Difference(key, values))
    return found + _unequal_tokens(named) + _unequal_base(named)


def _facts(run: Run) -> dict[str, Any]:
    """What has to be equal to the letter."""
    record = run.record
    data = record["data"]
    facts = {
        "data.train.fingerprint": data["train"]["fingerprint"],
        "steps": record["steps"],
        "model.name": record["model"]["name"],
        "model.parameters": _base_parameters(record["model"]),
        "evaluation.steps": [evaluation["step"] for evaluation in record["evaluations"]],
        "evaluation.measures": sorted(
            [*run.final["learning"], *run.final["forgetting"]],
        ),
    }
    for label, loader in sorted(data["eval"].items()):
        facts[f"data.eval.{label}.fingerprint"] = loader["fingerprint"]
    return facts


def _base_parameters(model: Mapping[str, Any]) -> int:
    """An adapter's trainable parameters come on top of the base model's."""
    return model["parameters"] - (model["trainable_parameters"] if model["rank"] else 0)


def _unequal_tokens(named: Mapping[str, Run]) -> list[Difference]:
    """Equal for equal seeds; within 3 % over seeds."""
    tokens = {name: run.record["tokens"]["real"] for name, run in named.items()}
    by_seed: dict[int, set[int]] = {}
    for name, run in named.items():
        by_seed.setdefault(run.seed, set()).add(tokens[name])
    within = all(len(values) == 1 for values in by_seed.values())
    if within and max(tokens.values()) <= min(tokens.values()) * (1 + _TOKENS):
        return []
    return [Difference("tokens.real", tokens)]


def _unequal_base(named: Mapping[str, Run]) -> list[Difference]:
    """Step 0 is the base model's: every run must start from the same values."""
    found = []
    metrics = {
        name: {
            key: run.first["metrics"][key] for key in run.first["metrics"] if _kind(key) in KINDS
        }
        for name, run in named.items()
    }
    for key in dict.fromkeys(key for own in metrics.values() for key in own):
        values = {name: own[key] for name, own in metrics.items() if key in own}
        largest, smallest = max(values.values()), min(values.values())
        is_loss = _kind(key) in ("loss", "kl")
        allowed = _RELATIVE * max(1.0, abs(largest)) if is_loss else _ACCURACY
        if not largest - smallest <= allowed:
            rounded = {name: float(f"{value:.4g}") for name, value in values.items()}
            found.append(Difference(f"base.{key}", rounded))
    return found


def _kind(key: str) -> str:
    """Of a raw metric, <set>/<kind>."""
    return key.rpartition("/")[2]


def _sentence(difference: Difference, most: int = 3) -> str:
    """A value and the runs that have it; of many runs the first few."""
    names: dict[str, list[str]] = {}
    for name, value in difference.values.items():
        names.setdefault(str(value), []).append(name)
    parts = []
    for value, group in names.items():
        more = f" and {len(group) - most} more" if len(group) > most else ""
        parts.append(f"{value} in {', '.join(group[:most])}{more}")
    return f"{difference.key}: {'; '.join(parts)}"


def _is_below(key: str, allowed: str) -> bool:
    return key == allowed or key.startswith((f"{allowed}.", f"{allowed}[", f"{allowed} "))
