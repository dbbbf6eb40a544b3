"""Checked settings of the evaluation sets in a YAML's `sets`."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
)

from foundry_ext.utils.absent import present_sets
from foundry_ext.utils.errors import UserError, explain_invalid


def _check_file(path: str) -> str:
    if not Path(path).is_file():
        raise ValueError(
            "does not exist; `foundry-ext tasks` writes hellaswag, arc_challenge, winogrande and"
            " gsm8k"
        )
    return path


def _check_loader(loader: dict[str, Any]) -> dict[str, Any]:
    if not loader.get("dataset"):
        raise ValueError(
            "must have name (packed_finetuning or packed_text) and dataset, as in eval_loader"
        )
    return loader


class EvalSetConfig(BaseModel):
    """Settings that every set has."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: str
    role: Literal["learning", "forgetting"]
    """learning: the target task; forgetting: what the base model could do."""


class DocumentsSetConfig(EvalSetConfig):
    """Settings of held-out documents, measured by loss and optionally by KL to the base model."""

    loader: Annotated[dict[str, Any], AfterValidator(_check_loader)]
    """A packed loader, as in `eval_loader`."""
    kl: bool = False
    max_documents: PositiveInt | None = None
    """Documents to measure, evenly spaced over the set; None for all."""


class TaskSetConfig(EvalSetConfig):
    """Settings of sets that read a task's file."""

    path: Annotated[str, AfterValidator(_check_file)]
    num_fewshot: NonNegativeInt = 0
    max_items: PositiveInt | None = None
    """Questions or problems to measure, evenly spaced over the file; None for all."""


class MultipleChoiceSetConfig(TaskSetConfig):
    """Settings of multiple-choice questions, answered by the choice of highest log-probability."""

    metric: Literal["acc", "acc_norm"] = "acc_norm"
    """The metric that counts in forgetting/mean_accuracy."""
    logprob: bool = False
    """Also measure the log-probability of the right choice, in nats, summed over its tokens."""


class GenerationSetConfig(TaskSetConfig):
    """Settings of GSM8K problems, answered greedily and matched strictly and flexibly."""

    num_fewshot: NonNegativeInt = 5
    max_new_tokens: PositiveInt = 256


_TYPES = {
    "documents": DocumentsSetConfig,
    "multiple_choice": MultipleChoiceSetConfig,
    "generation": GenerationSetConfig,
}


def parse_sets(sets: Mapping[str, Mapping[str, Any]]) -> list[EvalSetConfig]:
    """Check a YAML's `sets` and return their settings, without sets that have nothing to read.

    Raises:
        UserError: no set, or an impossible key or value; names set, key and value.
    """
    if isinstance(sets, Mapping):
        # An override such as `sets.kl_docs=null` takes a set out.
        sets = present_sets(sets)
    if not isinstance(sets, Mapping) or not sets:
        raise UserError(f"sets: {sets!r}; must be a mapping of name to set, with at least one set")
    return [_parse_set(name, entry) for name, entry in sets.items()]


def _parse_set(name: str, entry: Mapping[str, Any]) -> EvalSetConfig:
    # The name becomes part of metric names, in which a slash separates.
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise UserError(f"sets.{name}: a name has letters, digits, '_', '.' and '-' only")
    if not isinstance(entry, Mapping):
        raise UserError(f"sets.{name}: {entry!r}; must be a mapping with role, type and its keys")
    kind = entry.get("type")
    if str(kind) not in _TYPES:
        raise UserError(f"sets.{name}.type: {kind!r}; choose one of {', '.join(_TYPES)}")
    model = _TYPES[str(kind)]
    values = {key: value for key, value in entry.items() if key != "type"}
    if "name" in values:
        raise UserError(f"sets.{name}.name: unknown key; the set's name is its key in `sets`")
    try:
        return model.model_validate({"name": name, **values})
    except ValidationError as error:
        known = ["type", *(key for key in model.model_fields if key != "name")]
        raise UserError(f"sets.{name}.{explain_invalid(error, known)}") from error
