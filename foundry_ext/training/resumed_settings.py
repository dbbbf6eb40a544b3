"""The judgement of a run that resumes with other settings or other evaluation data."""

import logging
from collections.abc import Mapping

from composer.core import State
from composer.utils import dist

from foundry_ext.data.dataset import PackedDataset
from foundry_ext.records.result_settings import (
    START_KEYS,
    Change,
    Effect,
    Saved,
    effect_of,
    find_changes,
)
from foundry_ext.training.data_checks import evaluated_datasets

log = logging.getLogger(__name__)

_WITH_DROPOUT = ", except that dropout draws other random numbers from here on"


def judge(before: Saved, now: Saved, *, is_start: bool) -> list[str]:
    """Return the changes that are refused, and log those that are allowed with their effect.

    Args:
        before: the settings of the checkpoint.
        now: those of the run that resumes from it.
        is_start: the YAML's load_path names the checkpoint, so it may differ from the first run's.
    """
    refused: list[str] = []
    allowed: dict[Effect, list[str]] = {}
    for change in find_changes(before, now):
        if change.key == "max_duration" or (is_start and change.key in START_KEYS):
            continue  # exact_resume compares durations when the clock is known
        effect = effect_of(change.key)
        if effect is Effect.CONTENT:
            # The first format kept no digest of evaluation sets.
            is_judged = before.defaults is not None or not change.key.startswith("callbacks.")
            effect = Effect.SAME_BITS if is_judged and _has_content(change, now) else effect
        if effect in (Effect.DECIDES, Effect.CONTENT):
            refused.append(str(change))
        elif effect is not Effect.SAME_BITS:
            allowed.setdefault(effect, []).append(str(change))
    if not refused and dist.get_global_rank() == 0:
        _announce(allowed, now)
    return refused


def _has_content(change: Change, now: Saved) -> bool:
    """Return whether a fingerprint of the documents or items is compared in place of the key."""
    if change.key.startswith("tokenizer"):
        loader = "train_loader"
    elif ".dataset" in change.key:
        loader = change.key.partition(".dataset")[0]
    else:
        return True  # the path of a set
    return str(now.given.get(f"{loader}.name", ("", None))[1]).startswith("packed_")


def _announce(allowed: Mapping[Effect, list[str]], now: Saved) -> None:
    texts = {
        Effect.ROUNDING: "the result stays equal to rounding",
        Effect.ANNOUNCED: "the result has both values, each for its steps",
    }
    for effect, text in texts.items():
        if effect in allowed:
            if effect is Effect.ROUNDING and _has_dropout(now):
                text += _WITH_DROPOUT
            log.warning("changed since the checkpoint: %s; %s", "; ".join(allowed[effect]), text)


def _has_dropout(settings: Saved) -> bool:
    return any("dropout" in key and value for key, (_, value) in settings.given.items())


def evaluation_data(state: State) -> dict[str, tuple[str, str]]:
    """Return (fingerprint, names of files) of what each packed evaluator measures, by its label."""
    return {
        label: (_fingerprint(dataset), dataset.describe_sources("name") or "")
        for label, dataset in evaluated_datasets(state.evaluators)
    }


def _fingerprint(dataset: PackedDataset) -> str:
    # Packing decides which documents a dropped last batch holds.
    packing = f"-{dataset.sampler.plan_digest(0)}" if dataset.sampler.drop_last else ""
    return dataset.documents.fingerprint + packing


def changed_data(
    before: Mapping[str, tuple[str, str]] | None, now: Mapping[str, tuple[str, str]]
) -> list[str]:
    """Return the evaluators whose documents changed; None for `before` means unknown."""
    return [
        f"content of eval_loader {name}: documents {before[label][0]}, now {fingerprint} ({label})"
        for label, (fingerprint, name) in now.items()
        if before is not None and label in before and before[label][0] != fingerprint
    ]
