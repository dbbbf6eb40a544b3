"""Plan of a run: its schedule, model, memory and time.

Data comes from the builders that training uses. Nothing is trained, and nothing is written but
the datasets' cache.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from foundry_ext.adapters.methods import Method, method_of_config
from foundry_ext.models.activations import Layer, count_layer
from foundry_ext.models.loss import chunk_rows
from foundry_ext.models.memory import (
    Memory,
    Parameters,
    estimate_memory,
    optimizer_states,
)
from foundry_ext.preflight.inspect.packs import Epoch, open_loader, open_tokenizer, totals_of
from foundry_ext.preflight.plan.evaluations import Evaluations, plan_evaluations, planned_sets
from foundry_ext.preflight.plan.model import PlannedModel
from foundry_ext.preflight.plan.roofline import Microbatch, card, predict
from foundry_ext.preflight.plan.schedule import Schedule, simulate_schedule
from foundry_ext.preflight.plan.throughput import (
    ThroughputEstimate,
    check_precision,
    estimate_throughput,
)
from foundry_ext.preflight.plan.work import StepWork, count_work
from foundry_ext.training.data_checks import (
    check_positions,
)
from foundry_ext.utils import nested
from foundry_ext.utils.environment import peak_memory


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that a plan states about a run."""

    name: str
    config: dict[str, Any]
    sources: list[dict[str, Any]]
    epoch: Epoch
    schedule: Schedule
    evaluations: Evaluations
    model: PlannedModel
    parameters: Parameters
    method: Method
    layer: Layer
    training_flops: float
    throughput: ThroughputEstimate
    num_ranks: int
    process_bytes: int
    """Memory of this process, imports and data, which a CPU run needs besides its tensors."""
    compiles_on_gpu: bool = False
    """Whether layers are compiled, and packs filled to one shape, on a GPU."""

    @cached_property
    def card_layer(self) -> Layer:
        """Bytes that a layer saves on a GPU. Counting a compiled layer takes ten seconds."""
        precision = str(self.config["precision"])
        if not self.compiles_on_gpu:
            return self.layer
        return count_layer(self.model.build, precision=precision, compiled=True)

    @cached_property
    def work(self) -> StepWork:
        """Counted work of a microbatch on a GPU."""
        return count_work(
            self.model.build,
            vocabulary=self.model.config.vocab_size,
            hidden=self.model.config.hidden_size,
            precision=str(self.config["precision"]),
            compiled=self.compiles_on_gpu,
        )

    @property
    def pack_tokens(self) -> int:
        return self.epoch.capacity

    @property
    def micro_packs(self) -> int:
        return int(self.config.get("device_train_microbatch_size") or 1)

    @property
    def checkpointing(self) -> bool:
        return bool(self.config["model"].get("activation_checkpointing"))

    @property
    def own_memory(self) -> Memory:
        """Estimated memory of the run as it is configured, on this machine."""
        return self.memory(self.pack_tokens, checkpointing=self.checkpointing)

    def memory(self, pack_tokens: int, *, checkpointing: bool, on_card: bool = False) -> Memory:
        """Estimate the memory of the run if its packs had this many tokens, here or on a GPU."""
        tokens = pack_tokens * self.micro_packs
        batch_tokens = self.epoch.batch_packs * self.pack_tokens / self.num_ranks
        return estimate_memory(
            self.model.config,
            self.card_layer if on_card else self.layer,
            self.parameters,
            num_tokens=tokens,
            num_loss_tokens=int(
                tokens * min(1.0, self.epoch.num_loss_tokens / self.epoch.num_tokens)
            ),
            precision=str(self.config["precision"]),
            optimizer=str(self.config["optimizer"]["name"]),
            activation_checkpointing=checkpointing,
            frozen_copy=any(settings.get("kl") for settings in planned_sets(self.config).values()),
            accumulates=batch_tokens > tokens,
            num_ranks=self.num_ranks,
            device="cuda" if on_card else self.throughput.kind,
        )


def plan_config(
    config: Mapping[str, Any], *, name: str, num_ranks: int = 1, compiles_on_gpu: bool = False
) -> Plan:
    """Plan one run of a resolved configuration, trained by `num_ranks` processes.

    `compiles_on_gpu` says whether its layers would be compiled on a GPU, see config/automatic.py.

    Raises:
        UserError: the run cannot be planned, or training itself would refuse it.
    """
    config = dict(config)
    precision = check_precision(config)
    model = PlannedModel.of(config["model"])
    tokenizer = open_tokenizer(config)
    _, train = open_loader(config, "train", tokenizer)
    check_positions(train, model.config.max_position_embeddings)
    schedule = simulate_schedule(train, config)
    process_bytes = peak_memory("cpu")  # before anything is timed
    return Plan(
        name=name,
        config=config,
        sources=train.description,
        epoch=totals_of(train),
        schedule=schedule,
        evaluations=plan_evaluations(
            config, schedule, model, tokenizer, train, num_ranks=num_ranks
        ),
        model=model,
        parameters=model.parameters,
        method=method_of_config(model.peft_config),
        layer=count_layer(model.build, precision=precision, compiled=_is_compiled(config)),
        training_flops=model.training_flops(schedule.totals),
        throughput=estimate_throughput(config, model, train, schedule),
        num_ranks=num_ranks,
        process_bytes=process_bytes,
        compiles_on_gpu=compiles_on_gpu,
    )


def _is_compiled(config: Mapping[str, Any]) -> bool:
    return nested.get(config, "model.compile") not in (None, "none", "auto")


def card_seconds(plan: Plan, name: str) -> float | None:
    """Return seconds of training and evaluation on a named card; None for a card without rates.

    A step is predicted from what it asks (roofline.py). Evaluation is taken to be as fast as
    training, FLOP for FLOP.
    """
    device = card(name)
    if device is None or str(plan.config["precision"]) == "fp32":
        return None
    totals, packs = plan.schedule.totals, plan.micro_packs
    steps = plan.schedule.steps
    num_microbatches = plan.epoch.batch_packs / packs
    batches = steps * num_microbatches
    full = plan.pack_tokens * packs
    step = predict(
        device,
        plan.work,
        plan.model.config,
        Microbatch(
            num_tokens=full if plan.compiles_on_gpu else totals.slots / batches,
            num_loss_tokens=totals.loss_tokens / batches,
            sum_squared_lengths=totals.sum_squared_lengths / batches,
        ),
        num_microbatches=num_microbatches / plan.num_ranks,
        chunk_rows=chunk_rows(plan.model.config.vocab_size, "cuda"),
        trained_bytes=plan.parameters.trainable_bytes,
        optimizer_states=optimizer_states(str(plan.config["optimizer"]["name"])),
        clips="gradient_clipping" in (plan.config.get("algorithms") or {}),
        trains_embedding=plan.parameters.is_full,
        activation_checkpointing=plan.checkpointing,
    )
    evaluated = plan.evaluations.total_flops / max(plan.training_flops, 1.0)
    return step.total * steps * (1 + evaluated)
