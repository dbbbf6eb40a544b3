"""Decides, before the first evaluation, whether a run may write its files.

A start touches nothing of an earlier run before its own first step has ended. Every callback and
logger that writes files names them here, and holds back what would change an existing file until
then. One decision covers them all: the start continues a run from its checkpoint, finds nothing in
its way, replaces what an earlier start of the same run left before its first checkpoint, or is
refused.
"""

import os
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from composer.callbacks import CheckpointSaver
from composer.core import State
from composer.utils import format_name_with_dist, partial_format

from foundry_ext.checkpoints.files import find_checkpoints
from foundry_ext.config.outputs import (
    EXPORT,
    ITEMS,
    METRICS,
    RECORD,
    SAVE_FOLDER,
    find_clash,
    find_name_fault,
    output_paths,
)
from foundry_ext.records.record import read_record
from foundry_ext.training.refusals import on_rank_zero
from foundry_ext.utils.errors import UserError
from foundry_ext.utils.nested import get
from foundry_ext.utils.redaction import REDACTED

# The beginning of every line that the two writers of lines write.
_LINES = {METRICS: b'{"batch": ', ITEMS: b'{"step": '}


class RunFiles:
    """The files and folders that one run writes, by the YAML's keys."""

    def __init__(self, state: State):
        self.run_name = state.run_name
        self.paths: dict[str, Path] = {}
        self.started: str | None = None
        """When the run in the loaded checkpoint started, as its record says; with the name it tells
        a run from others."""
        self.continues = False
        """Whether this start continues the run in its save_folder; known once settled."""
        self._is_settled = False
        self._checks: list[Callable[[State], None]] = []

    def add(self, key: str, path: str, *, check: Callable[[State], None] | None = None) -> Path:
        """Name an output, at `init`; return its path, `{run_name}` filled in.

        Args:
            key: the YAML's key.
            path: the key's value.
            check: a check of the writer's own, which rank 0 makes before the decision.

        Raises:
            UserError: the run's name is no name.
        """
        fault = find_name_fault(self.run_name)  # not every start comes through train.py
        if fault:
            raise UserError(f"run_name, {self.run_name!r}, {fault}")
        if check is not None:
            self._checks.append(check)
        self.paths[key] = Path(path.replace("{run_name}", self.run_name))
        return self.paths[key]

    def settle(self, state: State) -> None:
        """Decide, at `after_load`; the first of the run's writers asks. A collective.

        Raises:
            UserError: on every rank, if files are there that the run may not change; names them.
        """
        if self._is_settled:
            return
        self.continues = on_rank_zero(lambda: self._decide(state))
        self._is_settled = True

    def _decide(self, state: State) -> bool:
        saver = next((x for x in state.callbacks if isinstance(x, CheckpointSaver)), None)
        paths = dict(self.paths)
        if saver is not None:
            paths[SAVE_FOLDER] = Path(format_name_with_dist(saver.folder, self.run_name))
        clash = find_clash(paths)
        if clash:
            raise UserError(clash)
        for check in self._checks:
            check(state)
        found = {key: path for key, path in self.paths.items() if _is_there(path)}
        for key, path in found.items():
            _check_kind(key, path)
        record = _read(found[RECORD]) if RECORD in found else None
        if saver is not None and _is_own_checkpoint(state, saver, paths[SAVE_FOLDER]):
            if record is not None:
                self._check_same_run(found, record)
            return True
        saved = _checkpoints(state, saver, paths[SAVE_FOLDER]) if saver is not None else []
        if saved:
            found = {SAVE_FOLDER: saved[-1], **found}
        if found:
            self._check_replaceable(found, record, None if saver is None else saver.overwrite)
        return False

    def _check_same_run(self, found: dict[str, Path], record: dict[str, Any]) -> None:
        """Check that the files are those of the run in the checkpoint."""
        way_out = "name another path, or move it away"
        if self._is_of_another(record):
            raise UserError(
                f"{RECORD}: {found[RECORD]} is the record of another run, {_describe(record)}, than"
                f" the checkpoint that this start continues; {way_out}"
            )
        foreign = self._foreign(found, record)
        if foreign:
            raise UserError(
                f"{foreign}: {found[foreign]} is not of this run, whose record names another"
                f" place; {way_out}"
            )

    def _check_replaceable(
        self, found: dict[str, Path], record: dict[str, Any] | None, overwrite: bool | None
    ) -> None:
        """Check that a start from the beginning may replace what is there, and say so.

        `overwrite` is save_overwrite, or None in a run that saves no checkpoints.
        """
        if overwrite:
            reason = "as save_overwrite: true allows"
        elif (
            record is not None
            and self._is_name(record["run_name"])
            and SAVE_FOLDER not in found
            and _saved_nothing(record)
            and self._foreign(found, record) is None
        ):
            reason = f"left by a start that saved no checkpoint, {_describe(record)}"
        else:
            raise UserError(_refusal(found, record, overwrite))
        names = ", ".join(map(str, found.values()))
        print(f"after its first step, this run replaces {names}, {reason}", file=sys.stderr)

    def _is_of_another(self, record: dict[str, Any]) -> bool:
        known = self.started is not None
        other = not self._is_name(record["run_name"])
        return other or (known and record["started"] != self.started)

    def _is_name(self, recorded: str) -> bool:
        """Return whether a record's name is this run's; a name may have looked like a secret."""
        return recorded == self.run_name or REDACTED in recorded

    def _foreign(self, found: dict[str, Path], record: dict[str, Any]) -> str | None:
        """Return the key of a file that is there, but not where the record's run wrote, or None."""
        recorded = output_paths({**record["config"], "run_name": record["run_name"]})
        folder = recorded.get(RECORD, self.paths[RECORD]).parent
        for key, path in found.items():
            if key in (RECORD, SAVE_FOLDER):
                continue
            before = recorded.get(key)
            if before is not None and REDACTED in str(before):
                continue
            # The run's folder may have been moved as a whole.
            places = before and (
                os.path.abspath(before),
                os.path.abspath(self.paths[RECORD].parent / os.path.relpath(before, folder)),
            )
            if not places or os.path.abspath(path) not in places:
                return key
        return None


_FILES: "weakref.WeakKeyDictionary[State, RunFiles]" = weakref.WeakKeyDictionary()


def run_files(state: State) -> RunFiles:
    """Return the files of the run that has this state."""
    return _FILES.setdefault(state, RunFiles(state))


def _refusal(found: dict[str, Path], record: dict[str, Any] | None, overwrite: bool | None) -> str:
    key = RECORD if record is not None else next(iter(found))
    whose = "is there already"
    if record is not None:
        whose = f"is the record of an earlier run, {_describe(record)}"
        if overwrite is not None and SAVE_FOLDER not in found and not _saved_nothing(record):
            whose += ", whose checkpoints are gone"
    others = [str(path) for other, path in found.items() if other != key]
    beside = f" (also there: {', '.join(others)})" if others else ""
    ways = ["give this run another run_name, and paths that hold it"]
    if SAVE_FOLDER in found:
        ways.append("continue what is there with autoresume: true")
    if overwrite is not None:
        ways.append("replace it with save_overwrite: true")
    ways.append("or move those files away")
    return f"{key}: {found[key]} {whose}{beside}, and would be replaced; {', '.join(ways)}"


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_record(path)
    except UserError as error:
        raise UserError(f"{RECORD}: {error}; name another path, or move it away") from error


def _is_there(path: Path) -> bool:
    if path.is_dir():
        return any(path.iterdir())
    return path.is_symlink() or (path.exists() and path.stat().st_size > 0)


def _check_kind(key: str, path: Path) -> None:
    """Check that what is there is what a run writes under this key, whatever may be replaced."""
    start = _LINES.get(key, b"")
    if path.is_dir() != (key == EXPORT):
        kind = "a folder" if path.is_dir() else "a file"
        raise UserError(f"{key}: {path} is {kind}; name another place")
    if not start:
        return
    with path.open("rb") as file:
        line = file.read(len(start))
    if not start.startswith(line):  # a kill may have left part of it
        raise UserError(f"{key}: {path} holds something else than a run's lines; name another file")


def _is_own_checkpoint(state: State, saver: CheckpointSaver, folder: Path) -> bool:
    """Return whether the state was loaded from a checkpoint of this run's own folder."""
    if state.timestamp.batch == 0 or state.load_path is None:
        return False
    path, folder = (Path(os.path.abspath(x)) for x in (state.load_path, folder))
    depth = len(Path(saver.filename.filename).parts)  # a run below saves in a folder of its own
    return path.is_relative_to(folder) and len(path.relative_to(folder).parts) <= depth


def _checkpoints(state: State, saver: CheckpointSaver, folder: Path) -> list[Path]:
    """Return the link to the latest checkpoint and the checkpoints that are in the run's folder."""
    latest = []
    if saver.latest_filename is not None:
        name = saver.latest_filename.format(state)
        # Composer adds the suffix to links of sharded checkpoints.
        latest = [Path(name + suffix) for suffix in ("", ".symlink")]
    template = partial_format(saver.filename.filename, run_name=state.run_name)
    links = [path for path in latest if path.is_symlink() or path.exists()]
    return [*links, *find_checkpoints(folder, template)]


def _saved_nothing(record: dict[str, Any]) -> bool:
    """Return whether the record is of a start that did not finish and saved no checkpoint."""
    if record["status"] == "finished":
        return False
    if "checkpoint" in record:
        return record["checkpoint"] is None
    # Records from before 2026-11-29 do not say whether there is one.
    return record["steps"] == 0 or get(record["config"], SAVE_FOLDER) is None


def _describe(record: dict[str, Any]) -> str:
    when = record["ended"] or record["updated"]
    return f"{record['run_name']}, {record['status']} after {record['steps']} steps at {when}"
