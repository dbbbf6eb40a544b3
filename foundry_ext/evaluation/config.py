"""The YAML's `sets`, checked: a misspelt key is an error before the first step."""

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from foundry_ext.utils.absent import present_sets
from foundry_ext.utils.errors import UserError

ROLES = ("learning", "forgetting")


@dataclass(frozen=True, kw_only=True)
class SetSettings:
    """What every set has. Raises ValueError naming set, key and value."""

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
                f"sets.{self.name}.{key}: {value!r} is not a whole number of at least {least}"
            )

    def _check_file(self, path: str) -> None:
        if not Path(path).is_file():
            raise UserError(
                f"sets.{self.name}.path: {path} does not exist; `foundry-ext tasks` writes"
                " hellaswag, arc_challenge, winogrande and gsm8k"
            )


@dataclass(frozen=True, kw_only=True)
class DocumentsSettings(SetSettings):
    """Held-out documents: loss, and KL to the base model where asked for."""

    type: ClassVar[str] = "documents"
    loader: dict[str, Any] = field(default_factory=dict)
    """A packed loader, as in `eval_loader`."""
    kl: bool = False
    max_documents: int | None = None
    """Evenly spaced over the set; all where not given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_count("max_documents", 1)
        if type(self.kl) is not bool:
            raise UserError(f"sets.{self.name}.kl: {self.kl!r}; true or false")
        if not isinstance(self.loader, Mapping) or not self.loader.get("dataset"):
            raise UserError(
                f"sets.{self.name}.loader: {self.loader!r} is no loader; give name"
                " (packed_finetuning or packed_text) and dataset, as in eval_loader"
            )


@dataclass(frozen=True, kw_only=True)
class MultipleChoiceSettings(SetSettings):
    """A choice is right if its log-probability is the highest, summed or by character."""

    type: ClassVar[str] = "multiple_choice"
    path: str
    num_fewshot: int = 0
    max_items: int | None = None
    """Evenly spaced over the file; all where not given."""
    metric: str = "acc_norm"
    """Which of acc and acc_norm stands for the set in forgetting/mean_accuracy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_file(self.path)
        self._check_count("num_fewshot", 0)
        self._check_count("max_items", 1)
        if self.metric not in ("acc", "acc_norm"):
            raise UserError(f"sets.{self.name}.metric: {self.metric!r}; choose acc or acc_norm")


@dataclass(frozen=True, kw_only=True)
class GenerationSettings(SetSettings):
    """GSM8K: greedy answers, matched strictly and flexibly."""

    type: ClassVar[str] = "generation"
    path: str
    num_fewshot: int = 5
    max_new_tokens: int = 256
    max_items: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_file(self.path)
        self._check_count("num_fewshot", 0)
        self._check_count("max_new_tokens", 1)
        self._check_count("max_items", 1)


_TYPES = {
    settings.type: settings
    for settings in (DocumentsSettings, MultipleChoiceSettings, GenerationSettings)
}


def parse_sets(sets: Mapping[str, Mapping[str, Any]]) -> list[SetSettings]:
    """`sets` of a YAML -> the settings of each; one without anything to read is left out.

    Raises:
        UserError: nothing to measure, or an unknown or missing key, role, type or file.
    """
    if isinstance(sets, Mapping):
        sets = present_sets(sets)
    if not isinstance(sets, Mapping) or not sets:
        raise UserError(f"sets: {sets!r} names nothing to measure; give a mapping of name to set")
    return [_parse(name, given) for name, given in sets.items()]


def _parse(name: str, given: Mapping[str, Any]) -> SetSettings:
    # It becomes part of metric names, in which a slash separates.
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise UserError(f"sets.{name}: a name has letters, digits, '_', '.' and '-' only")
    if not isinstance(given, Mapping):
        raise UserError(f"sets.{name}: {given!r} is not a set; give role, type and its keys")
    keys = dict(given)
    kind = keys.pop("type", None)
    if kind not in _TYPES:
        raise UserError(f"sets.{name}.type: {kind!r}; choose one of {', '.join(_TYPES)}")
    settings = _TYPES[kind]
    known = {entry.name: entry for entry in fields(settings) if entry.name != "name"}
    unknown = sorted(map(str, keys.keys() - known.keys()))
    if unknown:
        raise UserError(
            f"sets.{name}: unknown key {unknown[0]!r}; a {kind} set takes type, {', '.join(known)}"
        )
    for key, entry in known.items():
        required = entry.default is MISSING and entry.default_factory is MISSING
        if required and key not in keys:
            raise UserError(f"sets.{name}: {key} is missing")
    return settings(name=name, **keys)
