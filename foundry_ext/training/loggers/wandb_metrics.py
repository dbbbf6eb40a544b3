"""`wandb_metrics`: Weights & Biases for metrics and records, but not for checkpoints."""

import copy
import logging
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from composer.core import State
from composer.loggers import Logger

from foundry_ext.records.record import RECORD_NAME, items_path, read_record
from foundry_ext.training.callbacks.run_record import RunRecord
from foundry_ext.training.logged_metrics import AGAINST_TOKENS, METRICS, TOKENS
from foundry_ext.training.loggers.wandb_background import BackgroundWandB
from foundry_ext.training.run_description import find_callback, method_of
from foundry_ext.utils.redaction import redact

# Keys that runs of the shipped YAMLs log; those of a kind of set, if they measure such a set.
PROMISED_KEYS = tuple(metric.key for metric in METRICS if not metric.only)
# Keys of the run's configuration besides the YAML; the first two are also its group and job type.
PROMISED_CONFIG = ("experiment", "method", "seed")


def _without_secrets(record: logging.LogRecord) -> bool:
    record.msg, record.args = redact(record.getMessage()), ()
    return True


class WandBMetrics(BackgroundWandB):
    """Composer's WandBLogger for runs that are compared. The arguments are those of `wandb`.

    Runs are grouped by the experiment of `run_record`, then by method (W&B's job type) and seed (in
    the configuration), unless `group` or `init_kwargs.job_type` are given. Every value is logged
    with the real tokens so far. The run's files include its record and items. Secrets are redacted
    from the configuration, the command line and W&B's log. The run's output is not captured unless
    `init_kwargs.settings.console` is set, and git's uncommitted changes are not saved unless
    `init_kwargs.settings.disable_git` is false.

    W&B never ends a run, and no step waits for it; see wandb_background.py.

    It refuses to look for checkpoints: `autoresume` looks for the newest one on disk and then asks
    every logger. Composer's WandBLogger would ask the W&B server, which offline ends the run with
    "can only be called after running init()" before its first step.
    """

    state: State | None = None

    def init(self, state: State, logger: Logger) -> None:
        self.state = state
        self._config: dict[str, Any] = {}
        record, method = find_callback(state, RunRecord), method_of(state).name
        config = {"method": method, "seed": state.rank_zero_seed}
        if record is not None:
            config["experiment"] = record.experiment
            self._init_kwargs.setdefault("group", record.experiment)
        self._init_kwargs.setdefault("job_type", method)
        self._init_kwargs["config"] = {**config, **(self._init_kwargs.get("config") or {})}
        settings = self._init_kwargs.pop("settings", None) or {}
        self._init_kwargs = {**redact(self._init_kwargs), "settings": settings}
        defaults = {
            # Otherwise wandb 0.18 waits minutes for the server when a table is logged offline.
            "allow_offline_artifacts": False,
            # llm-foundry prints the configuration, secrets included, and W&B would upload that.
            "console": "off",
            # A patch of uncommitted changes, or a job to repeat the run, may hold secrets.
            "disable_git": True,
            "disable_job_creation": True,
        }
        self._init_kwargs["settings"] = {**defaults, **settings}
        if self._init_kwargs["settings"]["console"] != "off":
            # Its other ways take the text before our output is redacted.
            self._init_kwargs["settings"]["console"] = "redirect"
        # wandb writes the settings and the environment's variables into its debug.log.
        logging.getLogger("wandb").addFilter(_without_secrets)
        self.connect(state, logger)

    def describe(self) -> None:
        import wandb

        wandb.define_metric(TOKENS)
        for names in AGAINST_TOKENS:
            wandb.define_metric(names, step_metric=TOKENS)
        if self._config:
            self._log_config(self._config)

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if self.state is not None:
            metrics = {TOKENS: self.state.timestamp.token.value, **metrics}
        values = copy.deepcopy(metrics)
        self.send(f"metrics of step {step}", partial(super().log_metrics, values, step))

    def log_table(
        self,
        columns: list[str],
        rows: list[list[Any]],
        name: str = "Table",
        step: int | None = None,
    ) -> None:
        call = partial(super().log_table, list(columns), copy.deepcopy(rows), name, step)
        self.send(f"{name} of step {step}", call, asks_server=True)

    def log_images(self, images: Any, name: str = "Images", *args: Any, **kwargs: Any) -> None:
        call = partial(super().log_images, copy.deepcopy(images), name, *args, **kwargs)
        self.send(f"images {name}", call, asks_server=True)

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        values = redact(hyperparameters)
        if self.state is not None:
            self._config |= values
        self.send("the configuration", partial(self._log_config, values))

    def _log_config(self, values: dict[str, Any]) -> None:
        import wandb

        super().log_hyperparameters(values)
        if wandb.run is not None and wandb.run.offline:
            # `wandb sync` of 0.18 uploads the configuration of the run's own entry in its file, and
            # leaves out what came later. Setting the tags writes that entry again.
            wandb.run.tags = wandb.run.tags or ()

    def upload_file(self, state: State, remote_file_name: str, *args: Any, **kwargs: Any) -> None:
        call = partial(super().upload_file, state, remote_file_name, *args, **kwargs)
        self.send(f"file {remote_file_name}", call, asks_server=True)

    def save_files(self) -> None:
        """Copy the record and its items to the run's files; links would point out of its folder."""
        import wandb

        record = find_callback(self.state, RunRecord) if self.state is not None else None
        if record is None or wandb.run is None or wandb.run.disabled:
            return
        path, folder = Path(record.path), Path(wandb.run.dir)
        try:
            content = read_record(path)
        except (OSError, ValueError):  # the run ended before its first record
            return
        if content["pid"] != os.getpid():  # it is another run's
            return
        files = {RECORD_NAME: path}
        items = items_path(path, content)
        if items is not None and items.is_file():
            files[content["items"]] = items
        for name, source in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / name)
            wandb.save(str(folder / name), base_path=str(folder), policy="now")

    def can_upload_files(self) -> bool:
        return False

    def download_file(
        self,
        remote_file_name: str,
        destination: str,
        overwrite: bool = False,
        progress_bar: bool = True,
    ) -> None:
        raise FileNotFoundError(f"{remote_file_name}: checkpoints are on disk, not in W&B")
