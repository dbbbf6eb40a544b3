"""Checked settings of the evaluation sets in a YAML's `sets`."""

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from foundry_ext.utils.absent import present_sets
from foundry_ext.utils.errors import UserError, suggest

ROLES = ("learning", "forgetting")


@dataclass(frozen=True, kw_only=True)
class EvalSetConfig:
    """Settings that every set has.

    Raises:
        UserError: an impossible value; names set, key and value.
    """

    name: str
    role: str
    """learning: the target task; forgetting: what the base model could do."""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise UserError(f"sets.{self.name}.role: {self.role!r}; choose {' or '.join(ROLES)}")

    def _check_count(self, key: str, least: int) -> None:
        value = getattr(self, key)
        if value is not None and (type(value) is not int or value < least):
            raise UserError(
                f"sets.{self.name}.{key}: {value!r}; must be an integer of at least {least}"
            )

    def _check_file(self, path: str) -> None:
        if not Path(path).is_file():
            raise UserError(
                f"sets.{self.name}.path: {path} does not exist; `foundry-ext tasks` writes"
                " hellaswag, arc_challenge, winogrande and gsm8k"
            )


@dataclass(frozen=True, kw_only=True)
class DocumentsSetConfig(EvalSetConfig):
    """Settings of held-out documents, measured by loss and optionally by KL to the base model."""

    type: ClassVar[str] = "documents"
    loader: dict[str, Any] = field(default_factory=dict)
    """A packed loader, as in `eval_loader`."""
    kl: bool = False
    max_documents: int | None = None
    """Documents to measure, evenly spaced over the set; None for all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_count("max_documents", 1)
        if type(self.kl) is not bool:
            raise UserError(f"sets.{self.name}.kl: {self.kl!r}; choose true or false")
        if not isinstance(self.loader, Mapping) or not self.loader.get("dataset"):
            raise UserError(
                f"sets.{self.name}.loader: {self.loader!r}; must have name (packed_finetuning or"
                " packed_text) and dataset, as in eval_loader"
            )


@dataclass(frozen=True, kw_only=True)
class MultipleChoiceSetConfig(EvalSetConfig):
    """Settings of multiple-choice questions, answered by the choice of highest log-probability."""

    type: ClassVar[str] = "multiple_choice"
    path: str
    num_fewshot: int = 0
    max_items: int | None = None
    """Questions to measure, evenly spaced over the file; None for all."""
    metric: str = "acc_norm"
    """The metric, acc or acc_norm, that counts in forgetting/mean_accuracy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_file(self.path)
        self._check_count("num_fewshot", 0)
        self._check_count("max_items", 1)
        if self.metric not in ("acc", "acc_norm"):
            raise UserError(f"sets.{self.name}.metric: {self.metric!r}; choose acc or acc_norm")


@dataclass(frozen=True, kw_only=True)
class GenerationSetConfig(EvalSetConfig):
    """Settings of GSM8K problems, answered greedily and matched strictly and flexibly."""

    type: ClassVar[str] = "generation"
    path: str
    num_fewshot: int = 5
    max_new_tokens: int = 256
    max_items: int | None = None
    """Problems to measure, evenly spaced over the file; None for all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_file(self.path)
        self._check_count("num_fewshot", 0)
        self._check_count("max_new_tokens", 1)
        self._check_count("max_items", 1)


_TYPES = {
    kind.type: kind for kind in (DocumentsSetConfig, MultipleChoiceSetConfig, GenerationSetConfig)
}


def parse_sets(sets: Mapping[str, Mapping[str, Any]]) -> list[EvalSetConfig]:
    """Check a YAML's `sets` and return their settings, without sets that have nothing to read.

    Raises:
        UserError: no set, or an unknown or missing key, role, type or file.
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
    values = dict(entry)
    kind = values.pop("type", None)
    if kind not in _TYPES:
        raise UserError(f"sets.{name}.type: {kind!r}; choose one of {', '.join(_TYPES)}")
    known = {key.name: key for key in fields(_TYPES[kind]) if key.name != "name"}
    for key in sorted(map(str, values.keys() - known.keys())):
        raise UserError(
            f"sets.{name}: unknown key {key!r}{suggest(key, known)}; a {kind} set takes type,"
            f" {', '.join(known)}"
        )
    for key, definition in known.items():
        required = definition.default is MISSING and definition.default_factory is MISSING
        if required and key not in values:
            raise UserError(f"sets.{name}: {key} is missing")
    return _TYPES[kind](name=name, **values)
