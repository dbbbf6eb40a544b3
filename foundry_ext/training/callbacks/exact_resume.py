"""`exact_resume`: lets a run that was killed or stopped continue as if nothing had happened.

Composer 0.32.1's CheckpointSaver writes a checkpoint in place and moves the `latest` link by
removing it first, so after a kill in between a run dies on its own checkpoint or starts from the
beginning. This is that saver with atomic writes, and it chooses what Composer loads.
"""

import errno
import signal
import sys
from pathlib import Path
from typing import Any

from composer.callbacks import CheckpointSaver
from composer.core import State
from composer.core.time import Time, TimeUnit, ensure_time
from composer.loggers import Logger
from composer.utils import checkpoint, dist, format_name_with_dist, partial_format
from llmfoundry.utils.config_utils import TRAIN_CONFIG_KEYS, TrainConfig

from foundry_ext.checkpoints import files as checkpoint_files
from foundry_ext.checkpoints.load_path import check_is_seen, check_load_path
from foundry_ext.checkpoints.run_folder import RunFolder
from foundry_ext.checkpoints.setting_defaults import setting_defaults
from foundry_ext.evaluation.base_model import weights_fingerprint
from foundry_ext.records.result_settings import Saved, digest_settings, result_settings
from foundry_ext.training.attention_choice import keep_backend, used_backend
from foundry_ext.training.automatic_choices import keep_choices
from foundry_ext.training.autoresume import load_what_is_chosen
from foundry_ext.training.callbacks.run_record import RunRecord
from foundry_ext.training.max_duration import check_change, no_batch_is_left
from foundry_ext.training.meter import unwrapped
from foundry_ext.training.refusals import on_every_rank, on_rank_zero
from foundry_ext.training.resumed_settings import changed_data, evaluation_data, judge
from foundry_ext.training.run_description import find_callback
from foundry_ext.training.run_files import run_files
from foundry_ext.training.signals import StopSignals
from foundry_ext.utils.constants import NEW_RUN
from foundry_ext.utils.errors import UserError


class ExactResume(CheckpointSaver):
    """Checkpoint saver that replaces Composer's, controlled by the YAML's own save_... keys.

    Checkpoints are written atomically, and the previous one stays until the next is on the disk.
    With `autoresume` the newest intact checkpoint is loaded; damaged ones are named and skipped. A
    checkpoint of a run with other settings or other evaluation data is refused, and the loader
    refuses other training data; docs/what-decides.md lists the settings that may change. A second
    run in the same folder is refused while the first one is running.

    SIGTERM and Ctrl-C save at the end of the batch, after its evaluation if there is one, and end
    the run with exit code 128 plus the signal's number. The run's record says "stopped". A run that
    is killed after its last batch repeats what follows it: evaluation, export, record.

    Sharded checkpoints of FSDP are written by Composer's own code.

    Args:
        train_config: the complete YAML; llm-foundry passes it.

    Raises:
        UserError: save_folder is missing or not local, or too little is saved to resume from.
    """

    def __init__(self, train_config: dict[str, Any]):
        def key(name: str) -> Any:
            value = train_config.get(name)
            return TrainConfig.__dataclass_fields__[name].default if value is None else value

        folder, filename = checkpoint_files.check_folder(key("save_folder")), key("save_filename")
        filename = filename or "ep{epoch}-ba{batch}-rank{rank}.pt"  # defaults as in llm-foundry
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
            raise UserError("save_num_checkpoints_to_keep: 0 leaves nothing to resume from; keep 2")
        for name in ("save_weights_only", "save_ignore_keys"):
            if key(name):
                raise UserError(
                    f"{name}: {key(name)} leaves too little to resume from exactly; leave it out,"
                    " or leave out exact_resume and autoresume"
                )
        self.signals = StopSignals()
        self.ended_at: Time | None = None
        self.autoresume, self.load_path = key("autoresume"), key("load_path")
        # llm-foundry adds the keys of `metadata` to those of the YAML.
        config = {name: x for name, x in train_config.items() if name in TRAIN_CONFIG_KEYS}
        self.settings = Saved(digest_settings(result_settings(config)), setting_defaults(config))
        self.evaluated: dict[str, tuple[str, str]] = {}  # fingerprint and files of each evaluator
        self.duration = ensure_time(key("max_duration"), TimeUnit.EPOCH)
        self.saved_duration: Time | None = None
        self.resumed_from: str | None = None  # the checkpoint's path
        self.run_folder: RunFolder | None = None  # on rank 0
        self.base: str | None = None  # fingerprint of the weights under an adapter
        self.model: Any = None  # Composer's
        self.train_dataset: Any = None

    # --- before Composer loads -------------------------------------------------------------------

    def init(self, state: State, logger: Logger) -> None:
        super().init(state, logger)
        self.run_name = state.run_name
        folder = Path(format_name_with_dist(self.folder, state.run_name))
        template = partial_format(self.filename.filename, run_name=state.run_name)
        self.place = folder, template  # where the run's checkpoints are, and how they are named

    def before_load(self, state: State, logger: Logger) -> None:
        """Choose the newest intact checkpoint, which Composer loads next; change no file.

        Raises:
            UserError: no checkpoint is intact, another run saves there, or load_path names a file
                that is damaged or could run code.
        """
        self.resumed_from = on_rank_zero(lambda: self._choose(state))
        on_every_rank(lambda: self._check_here(state))
        self.evaluated = evaluation_data(state)
        model: Any = unwrapped(state)
        self.model = model
        self.train_dataset = getattr(state.train_dataloader, "dataset", None)
        if state.fsdp_config is None and getattr(model, "using_peft", False):
            self.base = weights_fingerprint(model.model)

    def _choose(self, state: State) -> str | None:
        """Lock the folder and return the checkpoint to continue from, on rank 0, or None."""
        if state.fsdp_sharded_state_dict_enabled:
            return None
        self.run_folder = RunFolder(*self.place, self._latest(state))
        self.run_folder.lock.take()
        if not self.autoresume:
            return None
        intact = self.run_folder.choose(overwrite=self.overwrite, load_path=self.load_path)
        self.saved_checkpoints = [str(path) for path in intact]
        return str(intact[-1]) if intact else None

    def _check_here(self, state: State) -> None:
        """Check what this rank would load; nodes may have disks of their own."""
        if self.resumed_from:
            check_is_seen(self.resumed_from)
        elif self.load_path is not None:
            name = format_name_with_dist(self.load_path, state.run_name)
            check_load_path(name, thoroughly=dist.get_local_rank() == 0)

    def _latest(self, state: State) -> Path:
        assert self.latest_filename is not None
        return Path(self.latest_filename.format(state))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that the checkpoint is of this run, then load it.

        Raises:
            UserError: the checkpoint is of a run with other settings; names each.
        """
        before = Saved(state["settings"], state.get("defaults"))
        if self.resumed_from:
            now = self.settings
            self.settings = keep_choices(self.model, self.train_dataset, before=before, now=now)
        changed = judge(before, self.settings, is_start=not self.resumed_from)
        changed += changed_data(state.get("evaluation"), self.evaluated)
        if self.resumed_from and state["run_name"] != self.run_name:
            changed.insert(0, f"run_name: {state['run_name']}, now {self.run_name}")
        if None not in (state["base"], self.base) and state["base"] != self.base:
            changed.insert(0, f"base model: weights {state['base']}, now {self.base}")
        if changed:
            # Composer finds sharded checkpoints itself, so the path is not known here.
            name = self.resumed_from or self.load_path or f"in {self.folder}"
            raise UserError(
                f"the checkpoint {name} is of a run with another"
                f" {'; another '.join(changed)}. Restore the YAML and the data; {NEW_RUN}"
            )
        keep_backend(self.model, state.get("attention_backend"))
        self.saved_duration = Time.from_timestring(state["duration"])
        super().load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "settings": dict(self.settings.given),
            "defaults": dict(self.settings.defaults or {}),
            "evaluation": self.evaluated,
            "run_name": self.run_name,
            "duration": self.duration.to_timestring(),
            "base": self.base,
            "attention_backend": used_backend(self.model),
        }

    # --- stopping --------------------------------------------------------------------------------

    def after_load(self, state: State, logger: Logger) -> None:
        """Report where the run continues; raise max_duration until `fit_start` if no batch is left.

        Composer's fit() refuses to train nothing, but evaluation, export or record may be missing.

        Raises:
            UserError: no batch is left because max_duration was shortened.
        """
        run_files(state).settle(state)
        if self.resumed_from:  # saved again under another name, it would push out an earlier one
            self.last_checkpoint_batch = state.timestamp.batch
        end = state.max_duration
        if end is None:
            return
        if self.resumed_from and dist.get_global_rank() == 0:
            batch = state.timestamp.batch.value
            print(f"continuing from {self.resumed_from}, after batch {batch}", file=sys.stderr)
        check_change(state, self.saved_duration)
        if no_batch_is_left(state) and dist.get_global_rank() == 0:
            text = f"this run had already reached max_duration, {end.to_timestring()}: no step"
            print(f"{text} is left, and what follows the last is repeated", file=sys.stderr)
        reached = state.timestamp.get(end.unit)
        if reached >= end:
            self.ended_at = end
            state.max_duration = reached + 1

    def fit_start(self, state: State, logger: Logger) -> None:
        """Refuse later checkpoints in the folder; after autoresume they are damaged ones."""
        if self.ended_at is not None:
            state.max_duration = self.ended_at
            state.previous_timestamp = state.timestamp  # without it no evaluation would be due
        if self.resumed_from is None and not self.overwrite:
            next_name = self.filename.format(state)
            on_rank_zero(lambda: checkpoint_files.check_none_later(*self.place, next_name))
        self.start_batch = state.timestamp.batch
        self.signals.install()

    def batch_end(self, state: State, logger: Logger) -> None:
        if self.run_folder is not None:
            self.run_folder.put_in_order()

    def fit_end(self, state: State, logger: Logger) -> None:
        """Put the folder in order after a start that had no batch left to train."""
        self.batch_end(state, logger)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        super().batch_checkpoint(state, logger)
        received = self.signals.agreed(state)
        assert state.max_duration is not None
        if not received or state.timestamp >= state.max_duration:
            return
        if self.last_checkpoint_batch != state.timestamp.batch:
            self._save_checkpoint(state, logger)
        reason = f"{signal.Signals(received).name} after batch {state.timestamp.batch.value}"
        record = find_callback(state, RunRecord)
        if record is not None:
            record.stop(f"stopped by {reason}; saved, so the same command continues from there")
        dist.barrier()  # no rank leaves while another still writes
        if dist.get_global_rank() == 0:
            print(f"stopped by {reason}: {self._latest(state)} is saved", file=sys.stderr)
        self.signals.remove()
        sys.exit(128 + received)

    def close(self, state: State, logger: Logger) -> None:
        self.signals.remove()
        if self.run_folder is not None:
            self.run_folder.lock.release()

    # --- saving ----------------------------------------------------------------------------------

    def _save_checkpoint(self, state: State, logger: Logger) -> None:
        """Save a checkpoint. A collective, in which rank 0 writes."""
        if state.fsdp_sharded_state_dict_enabled:
            return super()._save_checkpoint(state, logger)
        self.last_checkpoint_batch = state.timestamp.batch
        path = Path(self.filename.format(state))
        self.all_saved_checkpoints_to_timestamp[str(path)] = state.timestamp
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if dist.get_global_rank() != 0:
                checkpoint.save_checkpoint(state, str(path))
                return
            with checkpoint_files.replaced_checkpoint(path) as partial:
                checkpoint.save_checkpoint(state, str(partial))
            checkpoint_files.link_to(path, self._latest(state))
        except (OSError, RuntimeError) as error:
            if checkpoint_files.is_disk_full(error):
                described = checkpoint_files.describe_full(path, self.saved_checkpoints)
                raise OSError(errno.ENOSPC, described) from error
            raise
        assert self.remote_file_name is not None
        logger.upload_file(  # for loggers that keep artifacts
            remote_file_name=self.remote_file_name.format(state).lstrip("/"),
            file_path=path,
            overwrite=self.overwrite,
        )
        self.saved_checkpoints = [saved for saved in self.saved_checkpoints if saved != str(path)]
        self.saved_checkpoints.append(str(path))
        if self.num_checkpoints_to_keep > 0:
            while len(self.saved_checkpoints) > self.num_checkpoints_to_keep:
                Path(self.saved_checkpoints.pop(0)).unlink(missing_ok=True)


load_what_is_chosen(ExactResume)
