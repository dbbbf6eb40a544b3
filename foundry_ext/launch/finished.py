"""A start of a run that is finished: found before the slow imports, from the run's record."""

import glob
import os
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from foundry_ext.config.outputs import RECORD, output_paths
from foundry_ext.config.run_name import under_sweep
from foundry_ext.launch.nodes import spans_nodes
from foundry_ext.utils.errors import UserError
from foundry_ext.utils.nested import get, leaves

# Where a run reads files of the user's.
_READS = (
    *("model", "tokenizer", "train_loader", "eval_loader", "eval_loaders", "load_path"),
    *("callbacks.forgetting.sets", "icl_tasks", "eval_gauntlet", "code_paths"),
)


def describe_finished(config: Mapping[str, Any]) -> str | None:
    """Return a line about the run if it is finished and another start would repeat it, or None.

    The run must be meant to continue (`autoresume`). Its record must say that it is finished, with
    the same settings; its other files must be there, and what it reads must be older. Otherwise
    the run starts, and the checks of its checkpoint and data decide.

    Args:
        config: the resolved configuration, before automatic settings have got their values.
    """
    paths = output_paths(config)
    if not _may_be_skipped(config) or RECORD not in paths:
        return None
    record = _read_finished(paths[RECORD])
    if record is None or record["run_name"] != config.get("run_name"):
        return None
    if not all(map(_is_written, paths.values())):
        return None
    if _has_changed(config, record) or newest_input(config) > _seconds(record["started"]):
        return None
    return (
        f"{record['run_name']} is finished, as {paths[RECORD]} says ({record['steps']} steps, ended"
        f" {record['ended']}), so nothing is trained; raise max_duration,"
        f" {config['max_duration']}, to train it longer, or give another run_name to train anew"
    )


def _may_be_skipped(config: Mapping[str, Any]) -> bool:
    """Return whether the start is for what the run has not done yet, on this node alone.

    A W&B agent expects every start to log to its server.
    """
    other = ("save_overwrite", "only_hf_checkpoint", "only_composer_checkpoint")
    is_continued = bool(config.get("autoresume")) and not any(map(config.get, other))
    return is_continued and not under_sweep() and not spans_nodes()


def _read_finished(path: Path) -> dict[str, Any] | None:
    from foundry_ext.records.record import read_record

    try:
        record = read_record(path)
    except (OSError, UserError):
        return None
    return record if record["status"] == "finished" and record["defaults"] else None


def _is_written(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.is_file()


def _has_changed(config: Mapping[str, Any], record: Mapping[str, Any]) -> bool:
    """Return whether a setting differs, even one without effect on the result.

    Keys without effect that only the record has are llm-foundry's own, or were taken out.
    """
    from foundry_ext.records.result_settings import Effect, effect_of
    from foundry_ext.sweeps.plan import changes_since

    without_effect = (Effect.SAME_BITS, Effect.ROUNDING)
    return any(
        change.now is not None or effect_of(change.key) not in without_effect
        for change in changes_since(record["config"], record["defaults"], config)
    )


def newest_input(config: Mapping[str, Any]) -> float:
    """Return when a local file that the run reads last changed, in seconds since the epoch.

    The change time of a file cannot be set, unlike its time of modification.
    """
    times = [max(os.lstat(x).st_ctime, os.stat(x).st_ctime) for x in _inputs(config)]
    return max(times, default=0.0)


def _inputs(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the files and folders that the settings name, whatever their keys, and those below."""
    for section in _READS:
        for _, value in leaves(get(config, section), into_lists=True):
            for path in glob.glob(value) if isinstance(value, str) else ():
                below = Path(path).rglob("*") if os.path.isdir(path) else ()
                yield from filter(os.path.exists, [path, *map(str, below)])


def _seconds(moment: str) -> float:
    return datetime.fromisoformat(moment).astimezone(timezone.utc).timestamp()
