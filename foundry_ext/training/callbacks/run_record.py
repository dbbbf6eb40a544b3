"""Writes the run's record, whose keys records/record.py explains."""

import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from composer.core import Callback, Event, State
from composer.core.time import Time
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist

from foundry_ext.records.record import mark_failed, new_record, now, write_record
from foundry_ext.training.callbacks.forgetting import Forgetting
from foundry_ext.training.meter import (
    Counts,
    Meter,
    Utilisation,
    over_ranks,
    packed_dataset,
)
from foundry_ext.training.run_description import (
    check_data,
    describe_loader,
    describe_model,
    device_kind,
    evaluation_data,
    find,
    method_of,
)
from foundry_ext.utils.absent import run_settings
from foundry_ext.utils.environment import describe_environment, peak_memory
from foundry_ext.utils.errors import UserError

# llm-foundry adds its counts of parameters to the configuration it logs, and a slip of its own.
_NOT_IN_THE_YAML = ("n_params", "n_active_params", "n_trainable_params", "merge")


class RunRecord(Callback):
    """Writes `path` when training starts, after every evaluation, at every checkpoint and at the
    end, on rank 0 and for all ranks; a run that ends with an error leaves a record that says so.

    A resumed run goes on counting where its checkpoint was.

    Args:
        path: the record; `{run_name}` is replaced. Per-item files lie beside it.
        experiment: the question this run is a part of; W&B's group, too.
    """

    def __init__(self, path: str, experiment: str):
        self.path, self.experiment = path, experiment
        self.meter = Meter()
        # Of this rank since it started; and of all ranks up to the checkpoint that was loaded.
        self.all_steps, self.warm_steps = Counts(), Counts()
        self.past: dict[str, Any] = {
            "all_steps": asdict(Counts()),
            "warm_steps": asdict(Counts()),
            "wall_seconds": 0.0,
            "peak_memory": 0,
            "evaluations": [],
        }
        self.metrics: dict[str, float] = {}
        self.record: dict[str, Any] | None = None
        self.outcome: str | None = None
        """Once training has ended: the status that the record gets with the last evaluation."""

    # --- before the first step -------------------------------------------------------------------

    def init(self, state: State, logger: Logger) -> None:
        # Behind the others, so that what they measure at an event is there to be recorded.
        state.callbacks = [*(one for one in state.callbacks if one is not self), self]
        self.state, self.logged = state, _Logged()
        logger.destinations = (*logger.destinations, self.logged)

    def before_load(self, state: State, logger: Logger) -> None:
        assert state.max_duration is not None
        self.max_duration: Time = state.max_duration  # before exact_resume may raise the state's

    def fit_start(self, state: State, logger: Logger) -> None:
        dataset = packed_dataset(state, "run_record")
        check_data(state, dataset)
        config = self.logged.config
        if config is None:
            raise UserError(
                "run_record: log_config: false keeps the run's configuration from its record; leave"
                " that key out"
            )
        self.utilisation = Utilisation(state)
        self.fit_started = time.perf_counter()
        self.path = self.path.format(run_name=state.run_name)
        method, forgetting = method_of(state), find(state, Forgetting)
        self.record = new_record(
            run_name=state.run_name,
            experiment=self.experiment,
            method=method.name,
            seed=state.rank_zero_seed,
            learning_rate=float(config["optimizer"]["lr"]),
            config=run_settings(
                {key: value for key, value in config.items() if key not in _NOT_IN_THE_YAML}
            ),
            environment=describe_environment(
                device_kind=device_kind(state), world_size=dist.get_world_size()
            ),
            data={
                "train": describe_loader(dataset),
                "eval": evaluation_data(state, forgetting.sets if forgetting else ()),
            },
            model=describe_model(state, config, method),
            items=self._items(state),
        )
        self.record["started"] = self.past.get("started", self.record["started"])
        sizes = ("trainable_parameters", "effective_scale")
        found = {f"model/{key}": self.record["model"][key] for key in sizes}
        logger.log_metrics({key: value for key, value in found.items() if value is not None})
        self._write()

    def _items(self, state: State) -> str | None:
        forgetting = find(state, Forgetting)
        if forgetting is None or forgetting.items_path is None:
            return None
        items = Path(forgetting.items_path.format(run_name=state.run_name)).absolute()
        folder = Path(self.path).absolute().parent
        if not items.is_relative_to(folder):
            raise UserError(
                f"forgetting.items: {forgetting.items_path} does not lie beside the run's record;"
                f" give a path in {Path(self.path).parent}"
            )
        return items.relative_to(folder).as_posix()

    # --- training --------------------------------------------------------------------------------

    def before_dataloader(self, state: State, logger: Logger) -> None:
        self.meter.before_dataloader()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        self.meter.after_dataloader()

    def batch_end(self, state: State, logger: Logger) -> None:
        counts, first = self.meter.batch_end(state.batch)
        self.all_steps += counts
        if not first:
            self.warm_steps += counts

    def eval_standalone_end(self, state: State, logger: Logger) -> None:
        """What `eval_first` ends with, before `fit_start`."""
        self._take_metrics(state)

    def eval_after_all(self, state: State, logger: Logger) -> None:
        self._take_metrics(state)
        if self.outcome is not None:
            self._end()
        self._write()

    def fit_end(self, state: State, logger: Logger) -> None:
        """Where an evaluation follows yet, the run ends with that, or fails in it."""
        finished = state.timestamp >= self.max_duration  # state.stop_training() lowers the state's
        self.outcome = "finished" if finished else "stopped"
        # What Composer asks next; an interval's answer at this event changes nothing.
        intervals = [one.eval_interval for one in state.evaluators]
        if not any(due is not None and due(state, Event.FIT_END) for due in intervals):
            self._end()
        self._write()

    def _end(self) -> None:
        assert self.record is not None
        self.record.update(status=self.outcome, ended=now())

    def stop(self, reason: str) -> None:
        """To be called by all ranks at once, when they are about to end before the training has."""
        if self.record is not None:
            self.outcome = "stopped"
            self.record["error"] = reason
            self._end()
            self._write()

    def close(self, state: State, logger: Logger) -> None:
        """Where the training did not come to its end; other ranks may not be there any more."""
        if self.record is None or self.record["status"] != "running" or dist.get_global_rank() != 0:
            return
        error = sys.exc_info()[1] or getattr(sys, "last_value", None)
        mark_failed(self.path, error or "closed before the end of the training")

    def _take_metrics(self, state: State) -> None:
        """What Composer's evaluators have just logged: metrics/<label>/<metric>."""
        found = {f"eval/{name}": value for name, value in self.logged.metrics.items()}
        self.logged.metrics.clear()
        clock = state.timestamp
        entry = {
            "step": clock.batch.value,
            "real_tokens": clock.token.value,
            "metrics": found,
            "learning": {},
            "forgetting": {},
        }
        evaluations: list[dict[str, Any]] = self.past["evaluations"]
        if evaluations and evaluations[-1]["step"] == entry["step"]:
            entry["metrics"] = {**evaluations.pop()["metrics"], **found}
        evaluations.append(entry)

    def _evaluations(self) -> list[dict[str, Any]]:
        """Those of the `forgetting` callback, joined with those of Composer's evaluators."""
        joined = {one["step"]: dict(one) for one in self.past["evaluations"]}
        forgetting = find(self.state, Forgetting)
        for one in forgetting.evaluations if forgetting else ():
            earlier = joined.get(one["step"], {"metrics": {}})
            joined[one["step"]] = {**one, "metrics": {**earlier["metrics"], **one["metrics"]}}
        return [joined[step] for step in sorted(joined)]

    # --- the record ------------------------------------------------------------------------------

    def _write(self) -> dict[str, Any]:
        """The sums it wrote; to be called by all ranks at once."""
        record, state = self.record, self.state
        assert record is not None
        sums = self._sums()
        done, warm = Counts(**sums["all_steps"]), Counts(**sums["warm_steps"])
        timed = warm if warm.seconds else done
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
                "fill": timed.real_tokens / (timed.packs * capacity),
                "waiting_for_data": timed.waiting / timed.seconds,
                "mfu": self.utilisation.of(timed),
            }
        if dist.get_global_rank() == 0:
            write_record(self.path, record)
        return sums

    def _sums(self) -> dict[str, Any]:
        """Of all ranks and all processes this run has had; a collective."""
        peak = max(dist.all_gather_object(peak_memory(device_kind(self.state))))
        sums = {
            "wall_seconds": self.past["wall_seconds"] + time.perf_counter() - self.fit_started,
            "peak_memory": max(peak, self.past["peak_memory"]),
        }
        for name in ("all_steps", "warm_steps"):
            sums[name] = asdict(Counts(**self.past[name]) + over_ranks(getattr(self, name)))
        return sums

    def state_dict(self) -> dict[str, Any]:
        """Composer asks for this on every rank when it makes a checkpoint."""
        if self.record is None:
            return {}
        kept = {"started": self.record["started"], "evaluations": self.past["evaluations"]}
        return {**self._write(), **kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.past |= state


class _Logged(LoggerDestination):
    """Keeps the configuration that llm-foundry logs, and what an evaluation logs."""

    def __init__(self):
        self.config: dict[str, Any] | None = None
        self.metrics: dict[str, float] = {}

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        if "train_loader" in hyperparameters:  # others are Composer's, of versions and devices
            self.config = hyperparameters

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        for name, value in metrics.items():
            kind, _, rest = name.partition("/")
            if kind == "metrics" and not rest.startswith("train/"):
                self.metrics[rest] = float(value)
