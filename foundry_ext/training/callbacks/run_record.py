"""`run_record`: writes the run's record, whose keys records/schema.py explains."""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from composer.core import Event, State
from composer.core.time import Time
from composer.loggers import Logger
from composer.utils import dist

from foundry_ext.checkpoints.setting_defaults import setting_defaults
from foundry_ext.config.outputs import ITEMS, RECORD
from foundry_ext.records.record import mark_failed, new_record, now, write_record
from foundry_ext.training.automatic_choices import with_kept
from foundry_ext.training.callbacks.forgetting import Forgetting
from foundry_ext.training.meter import (
    MFUMeter,
    StepCounts,
    StepTimer,
    over_ranks,
    packed_dataset,
    unwrapped,
)
from foundry_ext.training.run_description import (
    LoggedSettings,
    describe_evaluation_data,
    describe_loader,
    describe_model,
    device_kind,
    environment_of,
    find_callback,
    inside_folder_of,
    method_of,
    newest_checkpoint,
)
from foundry_ext.training.run_files import run_files
from foundry_ext.training.weight_checks import check_final_weights
from foundry_ext.utils.absent import run_settings
from foundry_ext.utils.environment import peak_memory
from foundry_ext.utils.errors import UserError

# llm-foundry adds its counts of parameters to the configuration that it logs, and "merge", a slip.
_NOT_IN_THE_YAML = ("n_params", "n_active_params", "n_trainable_params", "merge")


class RunRecord(StepTimer):
    """Callback that writes the run's record on rank 0, with the counts of all ranks.

    It is written when training starts, after every evaluation, at every checkpoint and at the end.
    An earlier start's record is not replaced before the first step of this one has ended.
    A run that ends with an error has a record that names the error. A resumed run continues the
    counts of its checkpoint.

    Args:
        path: the record; `{run_name}` is replaced. Per-item files lie beside it.
        experiment: the question that this run is part of; also W&B's group.
    """

    def __init__(self, path: str, experiment: str):
        super().__init__()
        self.path, self.experiment = path, experiment
        # This rank's steps since it started; warm ones are all but the process's first.
        self.all_steps, self.warm_steps = StepCounts(), StepCounts()
        # Sums of all ranks up to the checkpoint that was loaded.
        self.past: dict[str, Any] = {
            "all_steps": asdict(StepCounts()),
            "warm_steps": asdict(StepCounts()),
            "wall_seconds": 0.0,
            "peak_memory": 0,
            "evaluations": [],
        }
        self.record: dict[str, Any] | None = None
        self.has_begun = False
        """Whether the first step has ended, or there was none left to do."""
        self.outcome: str | None = None
        """Final status, set when training ends; the record gets it with the last evaluation."""
        self.when_ended: list[Callable[[dict[str, Any]], None]] = []
        """Called on every rank with the ended record, once it is written."""

    # --- before the first step -------------------------------------------------------------------

    def init(self, state: State, logger: Logger) -> None:
        # Last, so that at every event the other callbacks have measured what is to be recorded.
        state.callbacks = [*(x for x in state.callbacks if x is not self), self]
        self.state, self.logged = state, LoggedSettings()
        logger.destinations = (*logger.destinations, self.logged)
        self.files = run_files(state)
        self.path = str(self.files.add(RECORD, self.path))

    def before_load(self, state: State, logger: Logger) -> None:
        assert state.max_duration is not None
        self.max_duration: Time = state.max_duration  # exact_resume may raise it later
        packed_dataset(state, "run_record")  # another loader is refused before the first evaluation

    def after_load(self, state: State, logger: Logger) -> None:
        """Refuse a record of another run, before the first evaluation."""
        self.files.settle(state)

    def fit_start(self, state: State, logger: Logger) -> None:
        dataset = packed_dataset(state, "run_record")
        logged = self.logged.config
        if logged is None:
            raise UserError(
                "run_record: log_config: false hides the run's configuration from its record; leave"
                " that key out"
            )
        self.mfu_meter = MFUMeter(state)
        self.fit_started = time.perf_counter()
        config = {key: value for key, value in logged.items() if key not in _NOT_IN_THE_YAML}
        method, forgetting = method_of(state), find_callback(state, Forgetting)
        self.record = new_record(
            run_name=state.run_name,
            experiment=self.experiment,
            method=method.name,
            seed=state.rank_zero_seed,
            learning_rate=float(config["optimizer"]["lr"]),
            config=with_kept(run_settings(config), unwrapped(state)),
            defaults=setting_defaults(config),
            environment=environment_of(state),
            data={
                "train": describe_loader(dataset),
                "eval": describe_evaluation_data(state, forgetting.sets if forgetting else ()),
            },
            model=describe_model(logged, method),
            items=self._relative_items_path(state),
        )
        self.record["started"] = self.past.get("started", self.record["started"])
        self.record["checkpoint"] = state.load_path if self.files.continues else None
        self.was_there = Path(self.path).exists()
        model = self.record["model"]
        logger.log_metrics(
            {
                f"model/{key}": model[key]
                for key in ("trainable_parameters", "effective_scale")
                if model[key] is not None
            }
        )
        self._write()

    def _relative_items_path(self, state: State) -> str | None:
        forgetting = find_callback(state, Forgetting)
        if forgetting is None or forgetting.items_path is None:
            return None
        return inside_folder_of(Path(self.path), self.files.paths[ITEMS], forgetting.items_path)

    # --- training --------------------------------------------------------------------------------

    def batch_end(self, state: State, logger: Logger) -> None:
        counts, is_first = self.finish_step(state.batch)
        self.all_steps += counts
        if not is_first:
            self.warm_steps += counts
        assert self.record is not None
        if not self.has_begun:
            self.has_begun = True
            self._write()
        elif self.record["checkpoint"] is None and newest_checkpoint(self.state) is not None:
            self._write_file()  # from now on a start from the beginning is refused

    def eval_standalone_end(self, state: State, logger: Logger) -> None:
        """Record the evaluation of `eval_first`, which comes before `fit_start`."""
        self._take_metrics(state)

    def eval_after_all(self, state: State, logger: Logger) -> None:
        self._take_metrics(state)
        if self.outcome is not None:
            self._end()
        self._write()

    def fit_end(self, state: State, logger: Logger) -> None:
        """End the record, unless an evaluation follows, in which the run may still fail."""
        check_final_weights(state)  # first: a record of such weights does not say finished
        # Not state.max_duration, which state.stop_training() lowers.
        finished = state.timestamp >= self.max_duration
        self.has_begun = True
        self.outcome = "finished" if finished else "stopped"
        # Composer asks the intervals next; asking them twice at this event changes nothing.
        intervals = [evaluator.eval_interval for evaluator in state.evaluators]
        if not any(is_due is not None and is_due(state, Event.FIT_END) for is_due in intervals):
            self._end()
        self._write()

    def _end(self) -> None:
        assert self.record is not None
        self.record.update(status=self.outcome, ended=now())

    def stop(self, reason: str) -> None:
        """End the record as stopped, before the end of training. A collective."""
        if self.record is not None:
            self.outcome = "stopped"
            self.record["error"] = reason
            self._end()
            self._write()

    def close(self, state: State, logger: Logger) -> None:
        """Mark the record failed if training did not end. Not a collective: ranks may be gone."""
        if self.record is None or self.record["status"] != "running" or dist.get_global_rank() != 0:
            return
        if self.was_there and not self.has_begun:  # what is there is an earlier start's
            return
        error = sys.exc_info()[1] or getattr(sys, "last_value", None)
        mark_failed(self.path, error or "closed before the end of the training")

    def _take_metrics(self, state: State) -> None:
        """Record what Composer's evaluators have just logged as metrics/<label>/<metric>."""
        metrics = {f"eval/{name}": value for name, value in self.logged.metrics.items()}
        self.logged.metrics.clear()
        clock = state.timestamp
        entry = {
            "step": clock.batch.value,
            "real_tokens": clock.token.value,
            "metrics": metrics,
            "learning": {},
            "forgetting": {},
        }
        evaluations: list[dict[str, Any]] = self.past["evaluations"]
        if evaluations and evaluations[-1]["step"] == entry["step"]:
            entry["metrics"] = {**evaluations.pop()["metrics"], **metrics}
        evaluations.append(entry)

    def _evaluations(self) -> list[dict[str, Any]]:
        """Return Composer's evaluations, joined by step with the `forgetting` callback's."""
        joined = {entry["step"]: dict(entry) for entry in self.past["evaluations"]}
        forgetting = find_callback(self.state, Forgetting)
        for entry in forgetting.evaluations if forgetting else ():
            metrics = joined.get(entry["step"], {"metrics": {}})["metrics"]
            joined[entry["step"]] = {**entry, "metrics": {**metrics, **entry["metrics"]}}
        return [joined[step] for step in sorted(joined)]

    # --- the record ------------------------------------------------------------------------------

    def _write(self) -> dict[str, Any]:
        """Write the record and return its sums over ranks. A collective."""
        record, state = self.record, self.state
        assert record is not None
        sums = self._sums()
        done, warm = StepCounts(**sums["all_steps"]), StepCounts(**sums["warm_steps"])
        timed = warm if warm.seconds else done  # a run of one step has no warm ones
        capacity = packed_dataset(state, "run_record").sampler.capacity
        record.update(
            pid=os.getpid(),
            updated=now(),
            steps=state.timestamp.batch.value,
            documents=done.documents,
            tokens={"slots": done.slots, "real": done.real_tokens, "loss": done.loss_tokens},
            time={"wall_seconds": sums["wall_seconds"], "train_seconds": done.seconds},
            peak_memory_bytes=sums["peak_memory"],
            evaluations=self._evaluations(),
        )
        if timed.seconds:
            record["throughput"] = {
                "real_tokens_per_second": timed.real_tokens / timed.seconds,
                "loss_tokens_per_second": timed.loss_tokens / timed.seconds,
                "fill": timed.packing_efficiency(capacity),
                "waiting_for_data": timed.waiting / timed.seconds,
                "mfu": self.mfu_meter.of(timed),
            }
        self._write_file()
        if record["ended"] is not None:
            for tell in self.when_ended:
                tell(record)
        return sums

    def _write_file(self) -> None:
        assert self.record is not None
        self.record["checkpoint"] = newest_checkpoint(self.state) or self.record["checkpoint"]
        may_write = self.has_begun or not self.was_there
        if may_write and dist.get_global_rank() == 0:
            write_record(self.path, self.record)

    def _sums(self) -> dict[str, Any]:
        """Return sums over all ranks and all processes that this run has had. A collective."""
        peak = max(dist.all_gather_object(peak_memory(device_kind(self.state))))
        sums = {
            "wall_seconds": self.past["wall_seconds"] + time.perf_counter() - self.fit_started,
            "peak_memory": max(peak, self.past["peak_memory"]),
        }
        for name in ("all_steps", "warm_steps"):
            sums[name] = asdict(StepCounts(**self.past[name]) + over_ranks(getattr(self, name)))
        return sums

    def state_dict(self) -> dict[str, Any]:
        """Write the record and return its sums. A collective: Composer calls it on every rank."""
        if self.record is None:
            return {}
        return {
            **self._write(),
            "started": self.record["started"],
            "evaluations": self.past["evaluations"],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.past |= state
        self.files.started = state.get("started")
