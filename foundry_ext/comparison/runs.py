"""Finished runs: finding and loading their records, and grouping them by label."""

import hashlib
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from foundry_ext.comparison import fairness, wandb_runs
from foundry_ext.records.record import RECORD_NAME, items_path, read_items, read_record
from foundry_ext.utils.errors import UserError
from foundry_ext.utils.output import printable_texts

ANALYSIS_NAME = "analysis.json"
_DIVERGED = "diverged: a loss that is not a number"
_NAMES = {"full": "full", "lora": "LoRA", "dora": "DoRA", "rslora": "rsLoRA"}
# Keys that tell groups of one method apart, in this order, with their short names in labels.
_MODEL_KEYS = {"rank": "r", "alpha": "α ", "init": "init ", "target_modules": "on "}


@dataclass(frozen=True)
class Run:
    """A finished run with at least two evaluations; `label` names its group, e.g. "LoRA r16"."""

    record: Mapping[str, Any]
    items: Sequence[Mapping[str, Any]] = ()
    analysis: Mapping[str, Any] | None = None
    label: str = ""

    @property
    def name(self) -> str:
        return self.record["run_name"]

    @property
    def seed(self) -> int:
        return self.record["seed"]

    @property
    def learning_rate(self) -> float:
        """The run's peak learning rate."""
        return float(self.record["learning_rate"])

    @property
    def first(self) -> Mapping[str, Any]:
        """The evaluation at step 0."""
        return self.record["evaluations"][0]

    @property
    def final(self) -> Mapping[str, Any]:
        """The evaluation at the end of training."""
        return self.record["evaluations"][-1]

    @cached_property
    def by_set(self) -> dict[tuple[int, str], dict[str, Mapping[str, Any]]]:
        """(step, set) -> item -> its line of the per-item file."""
        lines: dict[tuple[int, str], dict[str, Mapping[str, Any]]] = {}
        for line in self.items:
            lines.setdefault((line["step"], line["set"]), {})[str(line["item"])] = line
        return lines


@dataclass
class Loaded:
    """Runs to compare, and runs that are left out."""

    runs: list[Run] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    """name -> why it is left out."""
    diverged: list[Run] = field(default_factory=list)
    """Left-out runs that diverged. No mean includes them, but their learning rates were tried."""


def find_records(references: Sequence[str], downloads: Path) -> list[Path]:
    """Return the paths of all records that the references name.

    Args:
        references: run folders, records, folders of runs, folders of offline W&B runs, or
            entity/project/run_id of runs on W&B's server.
        downloads: folder for runs from the server.

    Raises:
        FileNotFoundError: a reference has no record.
    """
    paths: list[Path] = []
    for reference in references:
        path = Path(reference)
        if wandb_runs.is_online(reference):
            paths.append(wandb_runs.fetch_record(reference, downloads))
        elif path.is_file():
            paths.append(path)
        elif not path.exists():
            raise FileNotFoundError(f"{reference}: no such run, record or folder of runs")
        elif wandb_runs.is_local(path):
            paths.append(wandb_runs.local_record(path))
        elif (path / RECORD_NAME).is_file():
            paths.append(path / RECORD_NAME)
        else:
            paths += _records_below(path)
    return list({path.resolve(): path for path in paths}.values())


def _records_below(folder: Path) -> list[Path]:
    paths = sorted(folder.rglob(RECORD_NAME))
    if not paths:
        raise FileNotFoundError(f"{folder}: no {RECORD_NAME} in it, nor in any folder below")
    # W&B keeps copies of records, in folders called files: prefer the runs' own.
    originals = [path for path in paths if path.parent.name != "files"]
    return originals or paths


def load_runs(references: Sequence[Path | str]) -> Loaded:
    """Load runs, leaving out those that are unfinished, failed, or lack two evaluations.

    Args:
        references: what `find_records` takes, as paths or texts.

    Raises:
        FileNotFoundError: a reference has no record.
        ValueError: a record is corrupted, or no run is left to compare.
    """
    loaded = Loaded()
    with tempfile.TemporaryDirectory() as downloads:
        for path in find_records(list(map(str, references)), Path(downloads)):
            # Names and errors come from wherever the run was made, and end in terminals and pages.
            record = printable_texts(read_record(path))
            fairness.check_sections(str(path), record["config"])
            reason = why_left_out(record)
            if reason:
                loaded.left_out[record["run_name"]] = reason
                if reason == _DIVERGED:
                    loaded.diverged.append(Run(record))
                continue
            items = items_path(path, record)
            loaded.runs.append(
                Run(
                    record,
                    printable_texts(read_items(items))
                    if items is not None and items.is_file()
                    else (),
                    _read_analysis(path.parent / ANALYSIS_NAME),
                )
            )
    if not loaded.runs:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in loaded.left_out.items())
        raise UserError(f"no run is left to compare ({reasons})")
    loaded.runs = labelled(loaded.runs)
    return loaded


def why_left_out(record: Mapping[str, Any]) -> str | None:
    """Return the reason why a run cannot be compared, or None."""
    status = record["status"]
    if status == "failed":
        return f"failed: {record['error']}"
    if status != "finished":
        return "unfinished" if status == "running" else f"{status} before its end"
    evaluations = record["evaluations"]
    if len(evaluations) < 2 or evaluations[0]["step"] != 0:
        return "no evaluation both at step 0 and at the end"
    missing = [role for role in ("learning", "forgetting") if not evaluations[-1][role]]
    if missing:
        return (
            f"{' and '.join(missing)} {'were' if missing[1:] else 'was'} not measured: its YAML has"
            f" no set of role {' or '.join(missing)} under callbacks.forgetting.sets"
        )
    values = [*evaluations[-1]["learning"].values(), *evaluations[-1]["forgetting"].values()]
    if not all(map(math.isfinite, values)):
        return _DIVERGED
    return None


def _read_analysis(path: Path) -> Mapping[str, Any] | None:
    if not path.is_file():
        return None
    try:
        analysis = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not an analysis ({error})") from error
    if not isinstance(analysis, dict):
        raise UserError(f"{path}: not an analysis; write it again with `foundry-ext analyse`")
    return printable_texts(analysis)


def labelled(runs: Sequence[Run], settings: Sequence[Mapping[str, Any]] | None = None) -> list[Run]:
    """Return the runs labelled with their groups: the method, and what tells its groups apart.

    Args:
        runs: the runs.
        settings: dotted key -> value per run, with the same keys for all runs, of settings that
            differ between runs and therefore make groups.
    """
    settings = settings or [{}] * len(runs)
    all_traits = [_traits(run, values) for run, values in zip(runs, settings, strict=True)]
    result = []
    for run, traits in zip(runs, all_traits, strict=True):
        method = run.record["method"]
        same_method = [
            others
            for other, others in zip(runs, all_traits, strict=True)
            if other.record["method"] == method
        ]
        differing = [
            trait
            for trait, column in zip(traits, zip(*same_method, strict=True), strict=True)
            if trait and len(set(column)) > 1
        ]
        label = " ".join([_NAMES.get(method) or str(method), *differing])
        result.append(replace(run, label=label))
    return result


def _traits(run: Run, settings: Mapping[str, Any]) -> list[str]:
    model = run.record["model"]
    traits = [
        "" if model[key] is None else f"{short}{_short(model[key])}"
        for key, short in _MODEL_KEYS.items()
    ]
    marks = fairness.method(run.record["config"]).split(" ")[1:]
    traits.append(" ".join(mark for mark in marks if mark != str(model["init"])))
    for key, value in settings.items():
        name = key.removesuffix(" (names)").rpartition(".")[2]
        traits.append("" if value in (None, fairness.ABSENT) else _cut(f"{name} {_short(value)}"))
    return traits


def _cut(text: str) -> str:
    """Shorten a text to 40 characters, with a digest so that different texts stay different."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:6]
    return text if len(text) <= 40 else f"{text[:33]}…{digest}"


def _short(value: Any) -> str:
    if isinstance(value, float | int) and not isinstance(value, bool):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return "+".join(str(part).removesuffix("_proj") for part in value)
    return str(value)


def by_label(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Group runs by label; full fine-tuning, LoRA, DoRA, rsLoRA come first, in this order."""
    order = list(_NAMES)

    def position(run: Run) -> tuple[int, str]:
        method = run.record["method"]
        return (order.index(method) if method in order else len(order), run.label)

    groups: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (*position(run), run.learning_rate, run.seed)):
        groups.setdefault(run.label, []).append(run)
    return groups
