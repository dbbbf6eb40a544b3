"""Schema 1 of `record.json`: every key, its type, its meaning and its unit.

Measured values may be NaN, because a run that diverged has a record too. JSON as Python writes it
says NaN. Counts, durations and the learning rate are from 0 on and finite.
"""

from datetime import datetime
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from foundry_ext.utils.errors import UserError, shortened
from foundry_ext.utils.nested import leaves

_LONGEST_PATH = 200  # characters; file systems end at 255
LARGEST_COUNT = 2**100  # far below the largest float, so that quotients of counts are floats


def _inside_the_folder(path: str) -> str:
    if PurePosixPath(path).is_absolute() or ".." in path.split("/"):
        raise UserError("must not leave the record's folder; give a path inside it")
    return path


def _with_a_zone(time: str) -> str:
    try:
        has_zone = datetime.fromisoformat(time).tzinfo is not None
    except ValueError:
        has_zone = False
    if not has_zone:
        raise UserError("must be a time in ISO 8601 with its zone, as 2026-11-26T12:00:00+00:00")
    return time


def _in_reach(config: dict) -> dict:
    for key, value in leaves(config, into_lists=True):
        if isinstance(value, int) and abs(value) > LARGEST_COUNT:
            raise UserError(f"has {key}, {shortened(value)}; must be within {LARGEST_COUNT}")
    return config


Count = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
Finite = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Moment = Annotated[str, AfterValidator(_with_a_zone)]


class _Section(BaseModel):
    """Base of all sections: types are exact, and unknown keys are allowed."""

    # Strict, because Python takes True for 1; a float may still be written as an integer.
    model_config = ConfigDict(strict=True)


class Environment(_Section):
    """Software and device of the run."""

    python: str = Field(description="Python's version")
    packages: dict[str, str] = Field(description="version of each package that affects results")
    commit: str | None = Field(description="git commit of the code; null outside a repository")
    dirty: bool | None = Field(description="whether the code differs from that commit")
    device: str = Field(description="name of the GPU or processor")
    device_kind: str = Field(description="cpu or cuda")
    world_size: Count = Field(description="number of ranks")
    attention_backend: str | None = Field(
        default=None,
        description="attention backend of a packed model; on a CPU the one that auto chose. Records"
        " from before 2026-11-30 do not have it",
    )


class Loader(_Section):
    """Documents that one loader serves, counted over one epoch."""

    name: str | None = Field(description="dataset; for a mixture, the names of its sources")
    revision: str | None = Field(description="revision of the dataset; null for local files")
    fingerprint: str | None = Field(
        description="digest of tokens and labels, independent of their order and of the seed"
    )
    documents: Count | None = Field(description="documents in one epoch")
    tokens: Count | None = Field(description="tokens in one epoch")
    counts: dict[str, Count] = Field(
        description="documents by outcome (kept, truncated, ...), `tokens_cut` and"
        " `responses_not_trained`"
    )


class Data(_Section):
    """Training and evaluation data."""

    train: Loader = Field(description="the documents trained on")
    eval: dict[str, Loader] = Field(
        description="evaluation sets by name; Composer's own evaluators are named eval/<label>"
    )


class Model(_Section):
    """Model and fine-tuning method; the adapter's keys are null in full fine-tuning."""

    name: str = Field(description="model that training started from")
    parameters: Count = Field(description="number of parameters, the adapter's included")
    trainable_parameters: Count = Field(description="number of parameters that are trained")
    rank: Count | None = Field(description="rank of the adapter")
    alpha: float | None = Field(description="lora_alpha of the adapter")
    effective_scale: float | None = Field(
        description="factor of the adapter's product BA: alpha / rank, or alpha / sqrt(rank) for"
        " rsLoRA"
    )
    target_modules: list[str] | None = Field(description="modules that the adapter changes")
    init: str | None = Field(description="initialisation, e.g. default, random or pissa")


class Tokens(_Section):
    """Tokens of the training steps so far, over all ranks."""

    slots: Count = Field(description="tokens computed, padding included")
    real: Count = Field(description="tokens of documents")
    loss: Count = Field(description="tokens with a label")


class Time(_Section):
    """Wall seconds, without the time between an interruption and its resumption."""

    wall_seconds: Finite = Field(
        description="from the start of training to `updated`, evaluations included"
    )
    train_seconds: Finite = Field(description="training steps alone")


class Throughput(_Section):
    """Speed of the training steps on all devices together.

    Each process's first step is left out, because it compiles. All keys are null until one other
    step has ended.
    """

    real_tokens_per_second: float | None = Field(description="tokens of documents per second")
    loss_tokens_per_second: float | None = Field(description="tokens with a label per second")
    fill: float | None = Field(
        description="real tokens over the packs' capacity in the timed steps, 0 to 1"
    )
    waiting_for_data: float | None = Field(
        default=None,
        description="share of the time spent waiting for batches, 0 to 1; records from before"
        " 2026-11-26 do not have it",
    )
    mfu: float | None = Field(
        description="model FLOPs utilisation, 0 to 1, see models/flops.py; null if the device's"
        " peak is not known"
    )


class Evaluation(_Section):
    """Results of one evaluation during training."""

    step: Count = Field(description="optimizer steps before it")
    real_tokens: Count = Field(description="real tokens trained on before it")
    metrics: dict[str, float] = Field(
        description="raw values by <set>/<metric>; Composer's own evaluators are under"
        " eval/<label>/<metric>"
    )
    learning: dict[str, float] = Field(
        description="change since step 0 by <set>_<metric>; positive means more learned"
    )
    forgetting: dict[str, float] = Field(
        description="change since step 0 by <set>_<metric>; positive means more forgotten"
    )


class Record(_Section):
    """One run: its settings, costs and curves."""

    model_config = ConfigDict(strict=True, extra="forbid")

    schema_version: int = Field(description="1")
    run_name: str = Field(description="the run's name")
    status: Literal["running", "finished", "failed", "stopped"] = Field(
        description="stopped means before `max_duration`. A killed run leaves running, with a dead"
        " `pid` and an old `updated`; readers treat it as unfinished"
    )
    error: str | None = Field(description="why the run failed or stopped, as `Type: message`")
    started: Moment = Field(description="start of training, ISO 8601 in UTC")
    updated: Moment = Field(description="time of this record, ISO 8601 in UTC")
    ended: Moment | None = Field(description="end of training, ISO 8601 in UTC")
    pid: Count = Field(description="process id of rank 0")
    experiment: str = Field(description="the question this run is a part of")
    method: str = Field(description="fine-tuning method: full, lora, dora or rslora")
    seed: Count = Field(description="seed of the run")
    learning_rate: Finite = Field(description="peak learning rate")
    config: Annotated[dict, AfterValidator(_in_reach)] = Field(
        description="the resolved YAML, secrets redacted"
    )
    defaults: Annotated[dict, AfterValidator(_in_reach)] = Field(
        default={},
        description="dotted key -> default of a setting, in the version that wrote the record, for"
        " keys that the YAML leaves out; records from before 2026-11-29 do not have it",
    )
    environment: Environment
    data: Data
    model: Model
    checkpoint: str | None = Field(
        default=None,
        description="newest checkpoint when the record was written; null before the first one, and"
        " records from before 2026-11-29 do not have it",
    )
    steps: Count = Field(description="optimizer steps so far")
    documents: Count = Field(description="documents trained on so far, repeats included")
    tokens: Tokens
    time: Time
    peak_memory_bytes: Count | None = Field(
        description="largest memory of any rank, in bytes: allocated on the GPU, or resident"
    )
    throughput: Throughput
    evaluations: list[Evaluation] = Field(description="all evaluations, by step")
    items: (
        Annotated[str, Field(max_length=_LONGEST_PATH), AfterValidator(_inside_the_folder)] | None
    ) = Field(description="per-item results, a path relative to this record's folder")
