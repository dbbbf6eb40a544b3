"""What a sweep is going to do: its runs, each with name, command, configuration and cost."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from foundry_ext.adapters.methods import describe
from foundry_ext.config.loading import UsageError, load_config, record_path, split_arguments
from foundry_ext.records.result_settings import RESULT_SETTINGS, value_at
from foundry_ext.sweeps.file import Sweep, command_line, inside
from foundry_ext.sweeps.state import read_outcome
from foundry_ext.utils.redaction import redact

DURATION = re.compile(r"(?P<number>[0-9][0-9_.e+]*?) *(?P<unit>ep|ba|sp|tok|iter|sec)?")


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    name: str
    command: tuple[str, ...]
    """As in the sweep file, `composer` and `python` unresolved."""
    program: str
    arguments: tuple[str, ...]
    """Those of the program: one YAML and overrides."""
    config: dict[str, Any]
    """Resolved."""
    record: Path
    settings: Mapping[str, Any]
    """What the sweep sets, {dotted key: value}, the YAML's name left out."""

    @property
    def folder(self) -> Path:
        return self.record.parent


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one run stands when the sweep ends."""

    name: str
    status: str
    """finished, failed, stopped, killed, or waiting for one that was never started."""
    exit_code: int | None
    seconds: float
    record: Path
    log: Path


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one run; None where only the data would tell, or where nothing was measured."""

    tokens: float | None
    is_bound: bool
    """Whether `tokens` is the most it can be: packs may have empty slots."""
    seconds: float | None


@contextmanager
def naming_runs(sweep: str) -> Iterator[None]:
    """Configurations loaded within get their names as the sweep's runs themselves will."""
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
    """Each run with its YAML read and its overrides checked, in the order given."""
    if not Path(sweep.program).is_file():
        raise UsageError(f"{sweep.path}: program, {sweep.program}: no such file here")
    planned: dict[str, PlannedRun] = {}
    with naming_runs(sweep.name):
        for values in runs:
            run = _planned(sweep, values)
            if run.name in planned:
                raise UsageError(
                    f"{sweep.path}: two runs are named {run.name}; do not sweep run_name, and give "
                    "each YAML its own"
                )
            planned[run.name] = run
    owners: dict[Path, str] = {}
    for run in planned.values():
        if run.record in owners:
            raise UsageError(
                f"{sweep.path}: runs {owners[run.record]} and {run.name} share {run.folder}; "
                "put ${run_name} into the YAML's folder"
            )
        owners[run.record] = run.name
    return list(planned.values())


def _planned(sweep: Sweep, values: Mapping[str, Any]) -> PlannedRun:
    command = command_line(sweep, values)
    arguments = command[command.index(sweep.program) + 1 :]
    if any(argument.startswith("--") for argument in arguments):
        raise UsageError(
            f"{sweep.path}: command gives {sweep.program} arguments with hyphens; "
            "it takes key=value, which ${args_no_hyphens} writes"
        )
    try:
        files, overrides = split_arguments(arguments)
        if len(files) != 1:
            raise UsageError(f"{len(files)} YAML files in one run, {files}; give one as config")
        config = load_config(Path(inside(str(files[0]), "config")), overrides)
    except ValueError as error:
        raise UsageError(f"{sweep.path}: {error}") from error
    record = record_path(config)
    if record is None:
        raise UsageError(
            f"{files[0]}: no run_record under callbacks, which tells a sweep that the run is "
            "finished; add run_record: {path: ${variables.folder}/record.json, experiment: ...}"
        )
    resolved: Any = OmegaConf.to_container(config, resolve=True)
    name = str(resolved.get("run_name") or files[0].stem)
    if not re.fullmatch(r"[^/\\\0]+", name) or name in (".", ".."):
        raise UsageError(
            f"{files[0]}: run_name, {name!r}, is no file's name, as logs and locks need; leave out"
            " slashes"
        )
    keys = [override.partition("=")[0] for override in overrides]
    return PlannedRun(
        name=name,
        command=tuple(command),
        program=sweep.program,
        arguments=tuple(arguments),
        config=resolved,
        record=record,
        settings={key: _at(resolved, key) for key in keys},
    )


def _at(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config


def finished_otherwise(run: PlannedRun, record: Mapping[str, Any]) -> str:
    """`seed: 18, not 17` where a finished record is of other settings than the sweep's, or ''.

    What the sweep sets is compared, and of the YAML, which may have been edited since, all that a
    run's result depends on; what only one of the two has, such as a section added later, is not.
    """
    config = record.get("config")
    if not isinstance(config, dict):
        return ""
    planned = redact(run.config)
    for key in (*run.settings, *RESULT_SETTINGS):
        difference = _difference(value_at(config, key), value_at(planned, key), key)
        if difference:
            return difference
    return ""


def _difference(found: Any, wanted: Any, key: str) -> str:
    """The first one below `key`, in words, or ''."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        below = (_difference(found[k], wanted[k], f"{key}.{k}") for k in wanted if k in found)
        return next(filter(None, below), "")
    if found is None or wanted is None or found == wanted:
        return ""
    return f"{key}: {found!r}, not {wanted!r}"


def costs(runs: Sequence[PlannedRun], *, tokens_per_second: float | None) -> list[Cost]:
    """Tokens and seconds of each run.

    Seconds are those of finished runs of the same model, method and duration beside them; else
    tokens over `tokens_per_second`, or over the rate of finished runs of the same model and method.
    """
    folders = sorted({run.folder.parent for run in runs})
    seen = [_measured(record) for record in finished_records(folders)]
    found = []
    for run in runs:
        tokens, is_bound = tokens_of(run.config)
        whole, rate = kind(run.config, whole=True), kind(run.config, whole=False)
        same = [seconds for kinds, seconds, _ in seen if kinds[0] == whole]
        rates = [real / seconds for kinds, seconds, real in seen if kinds[1] == rate and seconds]
        seconds = None
        if tokens_per_second is None and same:
            seconds = sum(same) / len(same)
        elif tokens is not None and (tokens_per_second or rates):
            seconds = tokens / (tokens_per_second or sum(rates) / len(rates))
        found.append(Cost(tokens=tokens, is_bound=is_bound, seconds=seconds))
    return found


def tokens_of(config: Mapping[str, Any]) -> tuple[float | None, bool]:
    """Tokens a run trains on and whether that is a bound; None for epochs, samples, seconds."""
    match = DURATION.fullmatch(str(config.get("max_duration", "")).strip())
    if match is None:
        return None, False
    number, unit = float(match["number"]), match["unit"] or "ep"
    if unit == "tok":
        return number, False
    if unit != "ba":
        return None, False
    dataset = config["train_loader"].get("dataset") or {}
    pack = dataset.get("pack_tokens") or config["max_seq_len"]
    return number * config["global_train_batch_size"] * pack, True


def finished_records(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Of runs in folders below these."""
    paths = [path for folder in folders for path in sorted(folder.glob("*/record.json"))]
    records = map(read_outcome, paths)
    return [record for record in records if record.get("status") == "finished"]


def _measured(record: Mapping[str, Any]) -> tuple[tuple[Any, Any], float, float]:
    config = record.get("config") or {}
    seconds = float((record.get("time") or {}).get("wall_seconds") or 0)
    real = float((record.get("tokens") or {}).get("real") or 0)
    return (kind(config, whole=True), kind(config, whole=False)), seconds, real


def kind(config: Mapping[str, Any], *, whole: bool) -> Any:
    """What two runs share that take the same time (`whole`), or the same time a token."""
    model = config.get("model") or {}
    peft_config = model.get("peft_config")
    kind = [
        model.get("pretrained_model_name_or_path"),
        model.get("config_overrides"),
        describe(peft_config).name,
    ]
    if whole:
        dataset = (config.get("train_loader") or {}).get("dataset") or {}
        keys = ("max_duration", "global_train_batch_size", "eval_interval")
        kind += [config.get(key) for key in keys]
        kind += [dataset.get(key) for key in ("hf_name", "datasets", "pack_tokens")]
    return kind
