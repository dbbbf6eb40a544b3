"""The plan of a sweep: the name, command, configuration and estimated cost of each run."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from omegaconf import OmegaConf

from foundry_ext.adapters.methods import method_of_config
from foundry_ext.config.automatic import AUTO, EARLIER
from foundry_ext.config.loading import load_config, record_path, split_arguments
from foundry_ext.config.outputs import find_name_fault, find_shared
from foundry_ext.config.top_level_keys import TOP_LEVEL_KEYS
from foundry_ext.records.record import RECORD_NAME
from foundry_ext.records.result_settings import (
    Change,
    Effect,
    Saved,
    digest_settings,
    effect_of,
    find_changes,
    result_settings,
)
from foundry_ext.sweeps.file import Sweep, command_line, inside
from foundry_ext.sweeps.state import amount, read_run_record, wall_seconds
from foundry_ext.utils.errors import UserError
from foundry_ext.utils.nested import get
from foundry_ext.utils.redaction import redact

DURATION = re.compile(r"(?P<number>[0-9][0-9_.e+]*?) *(?P<unit>ep|ba|sp|tok|iter|sec)?")


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of a sweep, checked but not started."""

    name: str
    command: tuple[str, ...]
    """Command as written in the sweep file; `composer` and `python` are not resolved yet."""
    program: str
    arguments: tuple[str, ...]
    """Arguments of the program: one YAML and overrides."""
    config: dict[str, Any]
    """The configuration with all interpolations resolved."""
    record: Path
    keys: tuple[str, ...]
    """Dotted keys that the sweep sets."""

    @property
    def folder(self) -> Path:
        return self.record.parent


@dataclass(frozen=True, kw_only=True)
class SweepRunResult:
    """The state of one run at the end of the sweep."""

    name: str
    status: str
    """finished, failed, stopped, killed, or waiting if it was never started."""
    exit_code: int | None
    seconds: float
    record: Path
    log: Path


@dataclass(frozen=True, kw_only=True)
class CostEstimate:
    """Estimated cost of one run; None if it depends on the data or was never measured."""

    tokens: float | None
    is_bound: bool
    """True if `tokens` is an upper bound, because packs may have empty slots."""
    seconds: float | None


@contextmanager
def naming_runs(sweep: str) -> Iterator[None]:
    """Name configurations loaded within this context as runs of the sweep."""
    before = os.environ.get("FOUNDRY_EXT_SWEEP")
    os.environ["FOUNDRY_EXT_SWEEP"] = sweep
    try:
        yield
    finally:
        if before is None:
            del os.environ["FOUNDRY_EXT_SWEEP"]
        else:
            os.environ["FOUNDRY_EXT_SWEEP"] = before


def plan(sweep: Sweep, runs: Sequence[Mapping[str, Any]]) -> list[PlannedRun]:
    """Read the YAML and check the overrides of each run, in the order given."""
    if not Path(sweep.program).is_file():
        raise UserError(f"{sweep.path}: program, {sweep.program}: no such file here")
    with naming_runs(sweep.name):
        planned = [_plan_run(sweep, values) for values in runs]
    configs: dict[str, dict[str, Any]] = {}
    for run in planned:
        if run.name in configs:
            raise UserError(
                f"{sweep.path}: two runs are named {run.name}; do not sweep run_name, give each"
                " YAML its own, and give values that differ in more than quotes (the second run is"
                f" {' '.join(run.arguments)})"
            )
        configs[run.name] = run.config
    shared = find_shared(configs)
    if shared:
        name, key, place, owner = shared
        raise UserError(
            f"{sweep.path}: runs {owner} and {name} share {place}, as {key}; put ${{run_name}} into"
            " the YAML's folder"
        )
    return planned


def _plan_run(sweep: Sweep, values: Mapping[str, Any]) -> PlannedRun:
    command = command_line(sweep, values)
    arguments = command[command.index(sweep.program) + 1 :]
    if any(argument.startswith("--") for argument in arguments):
        raise UserError(
            f"{sweep.path}: command gives {sweep.program} arguments with hyphens; "
            "it takes key=value, which ${args_no_hyphens} writes"
        )
    try:
        files, overrides = split_arguments(arguments)
        if len(files) != 1:
            raise UserError(f"{len(files)} YAML files in one run, {files}; give one as config")
        config = load_config(Path(inside(str(files[0]), "config")), overrides)
    except ValueError as error:
        raise UserError(f"{sweep.path}: {error}") from error
    record = record_path(config)
    if record is None:
        raise UserError(
            f"{files[0]}: no run_record under callbacks, which tells a sweep that the run is "
            "finished; add run_record: {path: ${variables.folder}/record.json, experiment: ...}"
        )
    resolved: Any = OmegaConf.to_container(config, resolve=True)
    name = str(resolved.get("run_name") or files[0].stem)
    fault = find_name_fault(name)  # of the file's own name too, where there is no run_name
    if fault:
        raise UserError(f"{files[0]}: run_name, {name!r}, {fault}")
    return PlannedRun(
        name=name,
        command=tuple(command),
        program=sweep.program,
        arguments=tuple(arguments),
        config=resolved,
        record=record,
        keys=tuple(override.partition("=")[0] for override in overrides),
    )


def finished_otherwise(run: PlannedRun, record: Mapping[str, Any]) -> str:
    """Return how a finished record differs from the planned run, as `seed: 18, not 17`, or ''.

    The comparison covers the settings of the sweep, and all settings of the YAML that decide a
    run's result, because the YAML may have been edited since. A key that only one side has is a
    difference, unless its value is the other side's default.
    """
    config = record.get("config")
    if not isinstance(config, dict):
        return ""
    defaults = record.get("defaults") or {}
    changes = _changes(run, config, defaults)
    if not defaults and any(None in change for change in changes):
        # An earlier version wrote it. The import of a trainer takes long.
        from foundry_ext.checkpoints.setting_defaults import setting_defaults

        changes = _changes(run, config, setting_defaults(config) | setting_defaults(run.config))
    first = min(changes, key=lambda change: change.key not in run.keys, default=None)
    return f"{first.key}: {first.before!r}, not {first.now!r}" if first else ""


def _changes(
    run: PlannedRun, config: Mapping[str, Any], defaults: Mapping[str, Any]
) -> list[Change]:
    """Return the settings of the planned run that make another result than those of `config`."""
    without_effect = (Effect.SAME_BITS, Effect.ROUNDING)
    return [
        change
        for change in changes_since(config, defaults, run.config)
        if change.key in run.keys or effect_of(change.key) not in without_effect
    ]


def changes_since(
    recorded: Mapping[str, Any], defaults: Mapping[str, Any], config: Mapping[str, Any]
) -> list[Change]:
    """Return all settings of a resolved configuration that differ from those of a record.

    Args:
        recorded: the record's `config`.
        defaults: the record's `defaults`.
        config: the configuration; what it leaves to the machine is no difference.
    """
    # llm-foundry adds the keys of `metadata` to those of the YAML.
    before = {key: value for key, value in recorded.items() if key in TOP_LEVEL_KEYS}
    settings = (digest_settings(result_settings(side)) for side in (before, redact(config)))
    changes = find_changes(Saved(next(settings), defaults), Saved(next(settings), {}))
    return [change for change in changes if not _is_open(change)]


def _is_open(change: Change) -> bool:
    """Return whether the planned run leaves the value to the machine, as the finished one did."""
    return change.key in EARLIER and change.now in (None, AUTO)


def estimate_costs(
    runs: Sequence[PlannedRun], *, tokens_per_second: float | None
) -> list[CostEstimate]:
    """Estimate tokens and seconds of each run.

    Without `tokens_per_second`, seconds are the mean of finished runs in the same folder with the
    same model, method and duration. Otherwise they are tokens over `tokens_per_second`, or over
    the mean rate of finished runs with the same model and method.
    """
    folders = sorted({run.folder.parent for run in runs})
    measured = [cost for cost in map(_measured_cost, finished_records(folders)) if cost]
    estimates = []
    for run in runs:
        tokens, is_bound = tokens_of(run.config)
        run_key, rate_key = cost_key(run.config, whole=True), cost_key(run.config, whole=False)
        times = [seconds for keys, seconds, _ in measured if keys[0] == run_key]
        rates = [real / secs for keys, secs, real in measured if keys[1] == rate_key and secs]
        seconds = None
        if tokens_per_second is None and times:
            seconds = fmean(times)
        elif tokens is not None and (tokens_per_second or rates):
            seconds = tokens / (tokens_per_second or fmean(rates))
        estimates.append(CostEstimate(tokens=tokens, is_bound=is_bound, seconds=seconds))
    return estimates


def tokens_of(config: Mapping[str, Any]) -> tuple[float | None, bool]:
    """Return a run's tokens and whether they are a bound; None for epochs, samples, seconds."""
    match = DURATION.fullmatch(str(config.get("max_duration", "")).strip())
    if match is None:
        return None, False
    number, unit = float(match["number"]), match["unit"] or "ep"
    if unit == "tok":
        return number, False
    if unit != "ba":
        return None, False
    pack = get(config, "train_loader.dataset.pack_tokens") or config["max_seq_len"]
    return number * config["global_train_batch_size"] * pack, True


def finished_records(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the records of finished runs in subfolders of `folders`."""
    paths = [path for folder in folders for path in sorted(folder.glob(f"*/{RECORD_NAME}"))]
    records = map(read_run_record, paths)
    return [record for record in records if record.get("status") == "finished"]


def _measured_cost(record: Mapping[str, Any]) -> tuple[tuple[Any, Any], float, float] | None:
    """Return keys, seconds and tokens; None if the record's configuration is not a run's."""
    config = record.get("config")
    try:
        keys = cost_key(config or {}, whole=True), cost_key(config or {}, whole=False)
    except (AttributeError, ArithmeticError, TypeError, ValueError):  # edited by hand
        return None
    return keys, wall_seconds(record), amount(record, "tokens.real")


def cost_key(config: Mapping[str, Any], *, whole: bool) -> Any:
    """Return a key that is equal for runs that take equal time (`whole`), or equal time per token.

    It holds settings of the configuration alone, not of the machine.
    """
    names = ["model.pretrained_model_name_or_path", "model.config_overrides"]
    if whole:
        names += ["max_duration", "global_train_batch_size", "eval_interval"]
        keys = ("hf_name", "prepared", "datasets", "pack_tokens")
        names += [f"train_loader.dataset.{key}" for key in keys]
    method = method_of_config(get(config, "model.peft_config")).name
    return [method, *(get(config, name) for name in names)]
