"""Throughput of this device with a run's model, from finished runs or measured now."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from foundry_ext.data.dataset import PackedDataset
from foundry_ext.models.memory import PRECISIONS
from foundry_ext.preflight.plan.model import MeasuredThroughput, PlannedModel, measure_throughput
from foundry_ext.preflight.plan.schedule import Schedule
from foundry_ext.sweeps.plan import cost_key, finished_records
from foundry_ext.utils import nested
from foundry_ext.utils.environment import device_name
from foundry_ext.utils.errors import UserError
from foundry_ext.utils.progress import announce
from foundry_ext.utils.redaction import redact


@dataclass(frozen=True, kw_only=True)
class ThroughputEstimate:
    """Throughput of this device, and its source."""

    device: str
    kind: str
    """cpu or cuda."""
    tokens_per_second: float | None = None
    """Real tokens per second in finished runs; None if there are none."""
    num_records: int = 0
    evaluation_seconds: float | None = None
    """Seconds per evaluation, by the same records."""
    measured: MeasuredThroughput | None = None
    """Measured now, if there is no record."""

    @property
    def source(self) -> str:
        """Source of the throughput, in words."""
        if self.measured is None:
            return f"by {self.num_records} finished run{'s'[: self.num_records > 1]} like this one"
        return (
            f"measured now on {self.measured.num_tokens:,} tokens through one layer and three,"
            " without the trainer"
        )

    def training_seconds(self, schedule: Schedule) -> float | None:
        """Return the seconds on one device; None if this one cannot train the run."""
        if self.tokens_per_second is None and self.measured is None:
            return None
        if self.measured is None:
            assert self.tokens_per_second is not None
            return schedule.totals.real_tokens / self.tokens_per_second
        per_step = self.measured.seconds_per_step * schedule.steps
        return self.measured.seconds_per_token * schedule.totals.slots + per_step


def check_precision(config: Mapping[str, Any]) -> str:
    """Return the run's precision, whose cost is known.

    Raises:
        UserError: it is none of those, or missing.
    """
    precision = str(config.get("precision"))
    if precision not in PRECISIONS:
        raise UserError(f"precision: {precision!r} cannot be planned; {', '.join(PRECISIONS)} can")
    return precision


def estimate_throughput(
    config: dict[str, Any], model: PlannedModel, train: PackedDataset, schedule: Schedule
) -> ThroughputEstimate:
    """Use finished runs under outputs/ and beside this one, or else measure."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = device_name(device)
    folders = {Path("outputs")}
    if path := nested.get(config, "callbacks.run_record.path"):
        folders.add(Path(str(path)).parent.parent)
    records = finished_records(sorted(folders))
    records = [record for record in records if _is_similar(record, config, name)]
    seconds = sum(float(record["time"]["train_seconds"]) for record in records)
    if seconds:
        waits = [
            (record["time"]["wall_seconds"] - record["time"]["train_seconds"]) / len(evaluations)
            for record in records
            if (evaluations := record.get("evaluations"))
        ]
        return ThroughputEstimate(
            device=name,
            kind=device,
            tokens_per_second=sum(record["tokens"]["real"] for record in records) / seconds,
            num_records=len(records),
            evaluation_seconds=sum(waits) / len(waits) if waits else None,
        )
    if device == "cpu" and str(config["precision"]).startswith("amp_"):
        return ThroughputEstimate(device=name, kind=device)  # Composer refuses to train like this
    announce("measuring one layer and three of the model on this machine")
    first_pack = train.documents.lengths_of(train.sampler.documents_of_pack(0, 0))
    measured = measure_throughput(
        model,
        first_pack.tolist(),
        precision=str(config["precision"]),
        optimizer=str(config["optimizer"]["name"]),
        loss_share=schedule.totals.loss_tokens / schedule.totals.real_tokens,
        recomputes=bool(config["model"].get("activation_checkpointing")),
        device=device,
    )
    return ThroughputEstimate(device=name, kind=device, measured=measured)


def _is_similar(record: Mapping[str, Any], config: Mapping[str, Any], device: str) -> bool:
    """Return whether a token took that run as long as it will take this one."""
    other, environment = record.get("config") or {}, record.get("environment") or {}
    if environment.get("device") != device or environment.get("world_size") != 1:
        return False
    ours = redact(dict(config))
    settings = (
        *("precision", "train_loader.dataset.pack_tokens", "model.peft_config.r"),
        *("model.activation_checkpointing", "model.compile", "model.loss"),
        *("model.frozen_dtype", "model.attention_backend"),
    )

    def cost_settings(run: Mapping[str, Any]) -> list[Any]:
        return [cost_key(run, whole=False), *(nested.get(run, key) for key in settings)]

    return cost_settings(other) == cost_settings(ours)
