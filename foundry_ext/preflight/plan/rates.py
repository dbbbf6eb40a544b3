"""How fast this device trains a run's model: by the user's own records, or measured on the spot."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foundry_ext.data.dataset import PackedDataset
from foundry_ext.preflight.plan.course import Course
from foundry_ext.preflight.plan.model import PlannedModel, Speed, measure_speed
from foundry_ext.sweeps.plan import cost_key, finished_records
from foundry_ext.utils.environment import device_name
from foundry_ext.utils.redaction import redact

# Of a named card's dense bf16 peak. Not measured.
ASSUMED_MFU = 0.30


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How fast the device at hand is, and how that is known."""

    device: str
    kind: str
    """cpu or cuda."""
    tokens_per_second: float | None = None
    """Of finished runs; None where there are none."""
    num_records: int = 0
    evaluation_seconds: float | None = None
    """Of one evaluation, by the same records."""
    speed: Speed | None = None
    """Measured now, where there is no record."""

    @property
    def source(self) -> str:
        """How it is known."""
        if self.speed is None:
            return f"by {self.num_records} finished run{'s'[: self.num_records > 1]} like this one"
        return (
            f"measured now on {self.speed.num_tokens:,} tokens through one layer and three, without"
            " the trainer"
        )

    def training_seconds(self, course: Course) -> float | None:
        """On one device; None where this one cannot train the run."""
        if self.tokens_per_second is None and self.speed is None:
            return None
        if self.speed is None:
            assert self.tokens_per_second is not None
            return course.totals.tokens / self.tokens_per_second
        per_step = self.speed.seconds_per_step * course.steps
        return self.speed.seconds_per_token * course.totals.num_computed_tokens + per_step


def find_rates(
    config: dict[str, Any], model: PlannedModel, train: PackedDataset, course: Course
) -> Rates:
    """By finished runs under outputs/ and beside this one, else measured on the spot."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = device_name(device)
    similar = [one for one in finished_records(_folders(config)) if _is_similar(one, config, name)]
    seconds = sum(float(one["time"]["train_seconds"]) for one in similar)
    if seconds:
        points = [(one, len(one.get("evaluations") or [])) for one in similar]
        waits = [
            (one["time"]["wall_seconds"] - one["time"]["train_seconds"]) / number
            for one, number in points
            if number
        ]
        return Rates(
            device=name,
            kind=device,
            tokens_per_second=sum(one["tokens"]["real"] for one in similar) / seconds,
            num_records=len(similar),
            evaluation_seconds=sum(waits) / len(waits) if waits else None,
        )
    if device == "cpu" and str(config["precision"]).startswith("amp_"):
        return Rates(device=name, kind=device)  # Composer refuses to train so
    lengths = np.asarray(train.documents.lengths)[train.sampler.used]
    first_pack = lengths[train.sampler.plan(0)[0]]
    speed = measure_speed(
        model,
        first_pack.tolist(),
        precision=str(config["precision"]),
        optimizer=str(config["optimizer"]["name"]),
        loss_share=course.totals.loss_tokens / course.totals.tokens,
        recomputes=bool(config["model"].get("activation_checkpointing")),
        device=device,
    )
    return Rates(device=name, kind=device, speed=speed)


def _folders(config: Mapping[str, Any]) -> list[Path]:
    path = ((config.get("callbacks") or {}).get("run_record") or {}).get("path")
    beside = [Path(str(path)).parent.parent] if path else []
    return sorted({Path("outputs"), *beside})


def _is_similar(record: Mapping[str, Any], config: Mapping[str, Any], device: str) -> bool:
    """Whether a token took that run the time that it will take this one."""
    other, environment = record.get("config") or {}, record.get("environment") or {}
    if environment.get("device") != device or environment.get("world_size") != 1:
        return False
    ours = redact(dict(config))
    settings = ("activation_checkpointing", "compile", "loss", "frozen_dtype", "attention_backend")

    def settled(one: Mapping[str, Any]) -> list[Any]:
        model = one.get("model") or {}
        dataset = (one.get("train_loader") or {}).get("dataset") or {}
        return [
            cost_key(one, whole=False),
            one.get("precision"),
            (model.get("peft_config") or {}).get("r"),
            dataset.get("pack_tokens"),
            *(model.get(key) for key in settings),
        ]

    return settled(other) == settled(ours)
