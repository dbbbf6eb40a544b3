"""`exact_resume`: a run that was killed, stopped or cut off goes on as if nothing had happened.

Composer writes a checkpoint in place and moves the `latest` link by removing it, so a kill inside
leaves a run that dies on its own checkpoint or begins anew (0.32.1, CheckpointSaver). This is that
saver with another way to write, and a look at the folder before Composer chooses what to load.
"""

import errno
import logging
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from composer.callbacks import CheckpointSaver
from composer.core import State
from composer.core.time import Time, TimeUnit, ensure_time
from composer.loggers import Logger
from composer.utils import checkpoint, dist, format_name_with_dist, partial_format
from llmfoundry.utils.config_utils import TrainConfig

from foundry_ext.checkpoints import files as checkpoint_files
from foundry_ext.checkpoints.folder_lock import FolderLock
from foundry_ext.checkpoints.load_path import check_load_path
from foundry_ext.evaluation.base_model import weights_fingerprint
from foundry_ext.records.result_settings import (
    describe_changes,
    digest_settings,
    result_settings,
)
from foundry_ext.training.callbacks.run_record import RunRecord
from foundry_ext.training.meter import unwrapped
from foundry_ext.training.run_description import find
from foundry_ext.training.signals import StopSignals

log = logging.getLogger(__name__)

# A run that went on with another value of these would be a mixture of two. Of the data, what is
# read decides, not its name: the loader's own state holds it. Evaluating at other times harms none.
OTHERS_JUDGE = ("train_loader.dataset", "tokenizer")
MAY_CHANGE = ("eval_interval", "max_duration")


class ExactResume(CheckpointSaver):
    """Saves the run's checkpoints in Composer's place, by the YAML's own save_... keys.

    A checkpoint is whole or not there; the one before stays until the next is on the disk. With
    `autoresume` the newest whole one is loaded; one that is damaged is named and passed over. A run
    of other settings is refused, and other data by the loader's own state; a longer duration is
    not. A second run in the same folder is refused while the first one goes on.

    SIGTERM and Ctrl-C save at the end of the batch, of its evaluation if there is one, and end the
    run with exit code 128 and the signal's number; the run's record says "stopped". Killed after
    its last batch, a run does once more what follows it: evaluation, export, record.

    Sharded checkpoints of FSDP are written as Composer does.

    Args:
        train_config: the whole YAML, from llm-foundry.

    Raises:
        ValueError: no save_folder, one that is not local, or too little kept to resume from.
    """

    def __init__(self, train_config: dict[str, Any]):
        def key(name: str) -> Any:
            value = train_config.get(name)
            return TrainConfig.__dataclass_fields__[name].default if value is None else value

        folder, filename = checkpoint_files.check_folder(key("save_folder")), key("save_filename")
        filename = filename or "ep{epoch}-ba{batch}-rank{rank}.pt"  # these two as in llm-foundry
        latest = key("save_latest_filename") or "latest-rank{rank}.pt"
        super().__init__(
            folder=folder,
            filename=filename,
            remote_file_name=str(Path(folder, filename)),
            latest_filename=latest,
            latest_remote_file_name=str(Path(folder, latest)),
            save_interval=key("save_interval"),
            overwrite=key("save_overwrite"),
            num_checkpoints_to_keep=key("save_num_checkpoints_to_keep"),
            weights_only=key("save_weights_only"),
            ignore_keys=key("save_ignore_keys"),
        )
        if self.num_checkpoints_to_keep == 0:
            raise ValueError(
                "save_num_checkpoints_to_keep: 0 leaves nothing to go on from; keep 2, so that"
                " there is one before the newest"
            )
        for name in ("save_weights_only", "save_ignore_keys"):
            if key(name):
                raise ValueError(
                    f"{name}: {key(name)} leaves too little to go on from exactly; leave it out, or"
                    " leave out exact_resume and autoresume"
                )
        self.signals = StopSignals()
        self.ended_at: Time | None = None
        self.autoresume, self.load_path = key("autoresume"), key("load_path")
        self.lock = FolderLock(Path(folder))
        given = {**train_config, "seed": key("seed"), "precision": key("precision")}
        without = (*OTHERS_JUDGE, *MAY_CHANGE)
        self.settings = digest_settings(result_settings(given, without))
        self.duration = ensure_time(key("max_duration"), TimeUnit.EPOCH)
        self.saved_duration: Time | None = None
        self.found: str | None = None  # the checkpoint to go on from
        self.base: str | None = None  # of an adapter: the weights it stands on

    # --- before Composer loads -------------------------------------------------------------------

    def init(self, state: State, logger: Logger) -> None:
        super().init(state, logger)
        self.run_name = state.run_name

    def before_load(self, state: State, logger: Logger) -> None:
        """Where Composer is about to follow the `latest` link, makes it one to a whole checkpoint.

        Raises:
            ValueError: no checkpoint is whole, another run goes on there, or what load_path names
                is spoilt or could run code.
        """
        if dist.get_global_rank() == 0 and not state.fsdp_sharded_state_dict_enabled:
            folder = Path(format_name_with_dist(self.folder, state.run_name))
            self.lock.path = folder / self.lock.path.name
            self.lock.take()
            checkpoint_files.remove_partial(folder)
            found = self._find(state, folder) if self.autoresume else []
            if found:
                checkpoint_files.link_to(found[-1], self._latest(state))
            self.saved_checkpoints = [str(path) for path in found]
            self.found = str(found[-1]) if found else None
        # What one rank refuses all must: the others would wait for it.
        decided = [self.found]
        dist.broadcast_object_list(decided, src=0)
        self.found = decided[0]
        if self.load_path is not None and not self.found:
            name = format_name_with_dist(self.load_path, state.run_name)
            check_load_path(name, thoroughly=dist.get_local_rank() == 0)
        model: Any = unwrapped(state)
        if state.fsdp_config is None and getattr(model, "using_peft", False):
            self.base = weights_fingerprint(model.model)

    def _find(self, state: State, folder: Path) -> list[Path]:
        """Oldest first, ending with the one to go on from."""
        template = partial_format(self.filename.filename, run_name=state.run_name)
        paths = checkpoint_files.find_checkpoints(folder, template)
        latest = self._latest(state)
        if self.overwrite and latest.exists() and latest.resolve() in map(Path.resolve, paths):
            # Later ones may be of a run before, which this one writes over.
            names = [path.resolve() for path in paths]
            paths = paths[: names.index(latest.resolve()) + 1]
        given = Path(self.load_path) if self.load_path else None
        if not (paths or self.overwrite) and checkpoint_files.has_any(folder, besides=given):
            raise ValueError(
                f"{folder}: there are checkpoints, and none is called like save_filename,"
                f" {self.filename.filename}, so the run would begin anew beside them; restore them,"
                " or give the new run another folder"
            )
        return checkpoint_files.keep_whole(paths)

    def _latest(self, state: State) -> Path:
        assert self.latest_filename is not None
        return Path(self.latest_filename.format(state))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises:
        ValueError: the checkpoint is of a run with other settings; names each.
        """
        changed = describe_changes(state["settings"], self.settings)
        if self.found and state["run_name"] != self.run_name:
            changed.insert(0, f"run_name: {state['run_name']}, now {self.run_name}")
        if None not in (state["base"], self.base) and state["base"] != self.base:
            changed.insert(0, f"base model: of weights {state['base']}, now {self.base}")
        if changed:
            # Sharded ones are Composer's to find.
            name = self.found or self.load_path or f"in {self.folder}"
            raise ValueError(
                f"the checkpoint {name} is of a run with another"
                f" {'; another '.join(changed)}. Restore the YAML; give the run another name and"
                " save_folder; or begin anew from the checkpoint's weights with load_path,"
                " load_weights_only: true and another save_folder"
            )
        self.saved_duration = Time.from_timestring(state["duration"])
        super().load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        own = {
            "settings": self.settings,
            "run_name": self.run_name,
            "duration": self.duration.to_timestring(),
            "base": self.base,
        }
        return {**super().state_dict(), **own}

    # --- stopping --------------------------------------------------------------------------------

    def after_load(self, state: State, logger: Logger) -> None:
        """Says where the run goes on. Were its batches all done, Composer's fit() would complain.

        Raises:
            ValueError: it is done because max_duration was shortened.
        """
        end, before = state.max_duration, self.saved_duration
        if end is None:
            return
        if self.found and dist.get_global_rank() == 0:
            batch = state.timestamp.batch.value
            print(f"going on from {self.found}, after batch {batch}", file=sys.stderr)
        reached = state.timestamp.get(end.unit)
        if before is not None and repr(before) != repr(end):
            texts = before.to_timestring(), end.to_timestring()
            if reached > end or (reached == end and before.unit == end.unit):
                raise ValueError(
                    f"max_duration: {texts[0]}, now {texts[1]}, which the checkpoint has left"
                    " behind; restore it, or give the run another name and save_folder"
                )
            log.warning(
                "max_duration: %s, now %s. A schedule that ends with it is another one from here",
                *texts,
            )
        if reached >= end:
            self.ended_at = end
            state.max_duration = state.timestamp.get(end.unit) + 1

    def fit_start(self, state: State, logger: Logger) -> None:
        if self.ended_at is not None:
            state.max_duration = self.ended_at
            state.previous_timestamp = state.timestamp  # without one, no evaluation is due
        super().fit_start(state, logger)
        self.signals.install()

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        super().batch_checkpoint(state, logger)
        number = self.signals.agreed(state)
        assert state.max_duration is not None
        if not number or state.timestamp >= state.max_duration:
            return
        if self.last_checkpoint_batch != state.timestamp.batch:
            self._save_checkpoint(state, logger)
        reason = f"{signal.Signals(number).name} after batch {state.timestamp.batch.value}"
        record = find(state, RunRecord)
        if record is not None:
            record.stop(f"stopped by {reason}; saved, so that the same command goes on there")
        dist.barrier()  # no rank leaves while another still writes
        if dist.get_global_rank() == 0:
            print(f"stopped by {reason}: {self._latest(state)} is saved", file=sys.stderr)
        self.signals.remove()
        sys.exit(128 + number)

    def close(self, state: State, logger: Logger) -> None:
        self.signals.remove()
        self.lock.release()

    # --- saving ----------------------------------------------------------------------------------

    def _save_checkpoint(self, state: State, logger: Logger) -> None:
        """On all ranks at once; rank 0 writes."""
        if state.fsdp_sharded_state_dict_enabled:
            return super()._save_checkpoint(state, logger)
        self.last_checkpoint_batch = state.timestamp.batch
        path = Path(self.filename.format(state))
        self.all_saved_checkpoints_to_timestamp[str(path)] = state.timestamp
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if dist.get_global_rank() != 0:
                self._write(state, path)
                return
            with checkpoint_files.written_whole(path) as partial:
                self._write(state, partial)
            checkpoint_files.link_to(path, self._latest(state))
        except (OSError, RuntimeError) as error:
            if checkpoint_files.is_disk_full(error, path.parent):
                raise OSError(errno.ENOSPC, self._describe_full(path)) from error
            raise
        assert self.remote_file_name is not None
        logger.upload_file(  # to those that keep artifacts
            remote_file_name=self.remote_file_name.format(state).lstrip("/"),
            file_path=path,
            overwrite=self.overwrite,
        )
        self.saved_checkpoints = [one for one in self.saved_checkpoints if one != str(path)]
        self.saved_checkpoints.append(str(path))
        if self.num_checkpoints_to_keep > 0:
            while len(self.saved_checkpoints) > self.num_checkpoints_to_keep:
                Path(self.saved_checkpoints.pop(0)).unlink(missing_ok=True)

    def _write(self, state: State, path: Path) -> None:
        checkpoint.save_checkpoint(
            state=state,
            filename=str(path),
            weights_only=self.weights_only,
            ignore_keys=self.ignore_keys,
        )

    def _describe_full(self, path: Path) -> str:
        whole = self.saved_checkpoints[-1] if self.saved_checkpoints else None
        free = shutil.disk_usage(path.parent).free / 1e9
        return (
            f"no space left on the disk of save_folder for {path.name} ({free:.2f} GB free);"
            f" {f'{whole} is whole' if whole else 'there is no earlier checkpoint'}. Free some"
            " space and start the same command again"
        )
