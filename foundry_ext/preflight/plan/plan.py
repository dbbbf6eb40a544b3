"""What a run would do, before it does it: its course, its model, memory and time.

Data comes from the same builders as in training; nothing is trained and, the datasets' cache
aside, nothing is written.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from foundry_ext.adapters.methods import Method, method_of_config
from foundry_ext.data.dataset import PackedDataset
from foundry_ext.evaluation.config import DocumentsSetConfig, parse_sets
from foundry_ext.evaluation.generation import GenerationSet
from foundry_ext.evaluation.measure import build_sets
from foundry_ext.models.flops import peak_flops
from foundry_ext.models.memory import (
    PRECISIONS,
    Layer,
    Memory,
    Parameters,
    count_layer,
    estimate_memory,
)
from foundry_ext.preflight.inspect.packs import Epoch, open_loader, open_tokenizer, totals_of
from foundry_ext.preflight.plan.course import Course, follow
from foundry_ext.preflight.plan.model import PlannedModel
from foundry_ext.preflight.plan.rates import ASSUMED_MFU, Rates, find_rates
from foundry_ext.utils.environment import peak_memory
from foundry_ext.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Evaluations:
    """What is evaluated, and how often."""

    steps: list[int]
    tokens: dict[str, int]
    """Forward passes of one evaluation, by set; twice the tokens where KL is measured."""
    generated: int
    """Tokens of one evaluation, at most; these are not in any estimate of time."""
    flops: float
    """Of one evaluation."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that is said of a run."""

    name: str
    config: dict[str, Any]
    sources: list[dict[str, Any]]
    epoch: Epoch
    course: Course
    evaluations: Evaluations
    model: PlannedModel
    parameters: Parameters
    method: Method
    layer: Layer
    training_flops: float
    rates: Rates
    num_ranks: int
    process_bytes: int
    """Of this process with its imports and data, which a run on a CPU has besides its tensors."""

    @property
    def pack_tokens(self) -> int:
        return self.epoch.capacity

    @property
    def micro_packs(self) -> int:
        return int(self.config.get("device_train_microbatch_size") or 1)

    @property
    def checkpointing(self) -> bool:
        return bool(self.config["model"].get("activation_checkpointing"))

    def memory(self, pack_tokens: int, *, checkpointing: bool) -> Memory:
        """Of a run whose packs hold this many tokens."""
        tokens = pack_tokens * self.micro_packs
        batch_tokens = self.epoch.batch_packs * self.pack_tokens / self.num_ranks
        return estimate_memory(
            self.model.config,
            self.layer,
            self.parameters,
            num_tokens=tokens,
            num_loss_tokens=int(
                tokens * min(1.0, self.epoch.num_loss_tokens / self.epoch.num_tokens)
            ),
            precision=str(self.config["precision"]),
            optimizer=str(self.config["optimizer"]["name"]),
            activation_checkpointing=checkpointing,
            frozen_copy=_measures_kl(self.config),
            accumulates=batch_tokens > tokens,
            num_ranks=self.num_ranks,
        )


def plan_config(config: Mapping[str, Any], *, name: str, num_ranks: int = 1) -> Plan:
    """Plans one run.

    Args:
        config: resolved.
        num_ranks: processes it is to be trained by.

    Raises:
        UserError: what cannot be planned, and what training itself would refuse.
    """
    config = dict(config)
    precision = str(config.get("precision"))
    if precision not in PRECISIONS:
        raise UserError(f"precision: {precision!r} cannot be planned; {', '.join(PRECISIONS)} can")
    model = PlannedModel.of(config["model"])
    tokenizer = open_tokenizer(config)
    _, train = open_loader(config, "train", tokenizer)
    course = follow(train, config)
    process_bytes = peak_memory("cpu")  # before anything is timed
    totals = course.totals
    return Plan(
        name=name,
        config=config,
        sources=train.description,
        epoch=totals_of(train),
        course=course,
        evaluations=_evaluations(config, course, model, tokenizer),
        model=model,
        parameters=model.parameters,
        method=method_of_config(model.peft_config),
        layer=count_layer(model.build, precision=precision),
        training_flops=model.training_flops(
            totals.tokens, totals.loss_tokens, totals.sum_squared_lengths
        ),
        rates=find_rates(config, model, train, course),
        num_ranks=num_ranks,
        process_bytes=process_bytes,
    )


def _measures_kl(config: Mapping[str, Any]) -> bool:
    return any(one.get("kl") for one in _sets(config).values())


def _sets(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    sets = ((config.get("callbacks") or {}).get("forgetting") or {}).get("sets") or {}
    return {name: one for name, one in sets.items() if one}


def _evaluations(
    config: dict[str, Any],
    course: Course,
    model: PlannedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> Evaluations:
    tokens: dict[str, int] = {}
    generated, flops = 0, 0.0
    for label, dataset in _eval_datasets(config, tokenizer):
        lengths = np.asarray(dataset.documents.lengths, dtype=np.int64)
        tokens[label] = int(lengths.sum())
        flops += model.forward_flops(tokens[label], tokens[label], int((lengths**2).sum()))
    callbacks = config.get("callbacks") or {}
    samples = callbacks.get("text_samples") or {}
    generated += len(samples.get("prompts") or []) * int(samples.get("max_new_tokens", 48))
    given = _sets(config)
    sets = (
        build_sets(parse_sets(given), tokenizer, model.config.max_position_embeddings)
        if given
        else []
    )
    for one in sets:
        times = 1 + (isinstance(one.config, DocumentsSetConfig) and one.config.kl)
        number = int(one.description["tokens"]) * times
        tokens[one.config.name] = number
        if isinstance(one, GenerationSet):
            generated += int(one.description["documents"]) * one.config.max_new_tokens
        # Squares of lengths are some per cent here, and not known of all kinds of sets.
        flops += model.forward_flops(number, number, 0)
    starts = bool(config.get("eval_first")) or bool(given)
    steps = ([0] if starts and tokens else []) + (course.evaluated_at if tokens else [])
    return Evaluations(steps=steps, tokens=tokens, generated=generated, flops=flops)


def _eval_datasets(
    config: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, PackedDataset]]:
    """Those that Composer evaluates, by label."""
    section = config.get("eval_loader")
    entries = section if isinstance(section, list) else [section] if section else []
    found = []
    for entry in entries:
        one = {**config, "eval_loader": [entry]}
        found.append((entry.get("label", "eval"), open_loader(one, "eval", tokenizer)[1]))
    return found


def card_seconds(plan: Plan, card: str) -> float | None:
    """Training and evaluation on a named card, at an assumed share of its peak."""
    peak = peak_flops(card)
    if peak is None or str(plan.config["precision"]) == "fp32":
        return None
    again = 4 / 3 if plan.checkpointing else 1.0
    evaluated = len(plan.evaluations.steps) * plan.evaluations.flops
    return (plan.training_flops * again + evaluated) / (peak * ASSUMED_MFU * plan.num_ranks)
