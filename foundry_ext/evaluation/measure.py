"""Measurement of all evaluation sets on one model, without side effects on its training."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from foundry_ext.evaluation.config import (
    DocumentsSetConfig,
    EvalSetConfig,
    GenerationSetConfig,
    MultipleChoiceSetConfig,
)
from foundry_ext.evaluation.documents import DocumentsSet
from foundry_ext.evaluation.generation import GenerationSet
from foundry_ext.evaluation.metrics import Item, set_metrics
from foundry_ext.evaluation.multiple_choice import MultipleChoiceSet
from foundry_ext.evaluation.scoring import Shard
from foundry_ext.models.scores import BaseStates
from foundry_ext.models.smollm2 import SmolLM2ForCausalLM

# One rank's items -> those of all ranks.
Gather = Callable[[list[Item]], list[Item]]


class EvalSet(Protocol):
    """A set that can be measured."""

    @property
    def config(self) -> EvalSetConfig: ...

    @property
    def description(self) -> dict[str, Any]:
        """Name, revision, fingerprint, documents, tokens and counts, for the run's record."""
        ...

    @property
    def digest(self) -> str:
        """Digest of all that the set gives to a model and compares, 16 hex digits."""
        ...

    def measure(
        self, model: SmolLM2ForCausalLM, base: BaseStates | None, shard: Shard
    ) -> list[Item]:
        """Return this rank's part of the measurement, in any order."""
        ...

    def complete(self, gathered: Sequence[Item]) -> list[Item]:
        """Join the parts of all ranks to one line per item, in order, with key "item"."""
        ...


def build_sets(
    configs: Sequence[EvalSetConfig], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[EvalSet]:
    """Read and encode every set; prompts longer than `max_length` tokens are cut from the left.

    Raises:
        UserError: a file or loader does not hold what its type needs.
    """
    return [_build_set(config, tokenizer, max_length) for config in configs]


def _build_set(
    config: EvalSetConfig, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> EvalSet:
    if isinstance(config, DocumentsSetConfig):
        return DocumentsSet(config, tokenizer)
    if isinstance(config, MultipleChoiceSetConfig):
        return MultipleChoiceSet(config, tokenizer, max_length)
    assert isinstance(config, GenerationSetConfig)
    return GenerationSet(config, tokenizer, max_length)


def measure(
    sets: Sequence[EvalSet],
    model: SmolLM2ForCausalLM,
    base: BaseStates | None,
    *,
    shard: Shard = Shard(),  # noqa: B008 - immutable
    gather: Gather = list,
) -> tuple[dict[str, float], list[Item]]:
    """Measure every set; the model and the random state are afterwards as they were.

    KL is measured from `base`, and left out without it. Every rank calls `gather` once per set to
    get the items of all ranks.

    Returns:
        Figures by `<set>/<metric>`, and all items, each with its "set".
    """
    metrics: dict[str, float] = {}
    items: list[Item] = []
    with undisturbed(model):
        for eval_set in sets:
            name = eval_set.config.name
            measured = eval_set.complete(gather(eval_set.measure(model, base, shard)))
            metrics |= {f"{name}/{key}": value for key, value in set_metrics(measured).items()}
            items += [{"set": name, **item} for item in measured]
    return metrics, items


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluate without gradients, then restore the modules' modes and the random state.

    A run that is measured between two steps therefore takes the same steps as one that is not.
    """
    modes = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    forked = [device] if device.type == "cuda" else []
    python_state, numpy_state = random.getstate(), np.random.get_state()
    model.eval()
    try:
        with torch.random.fork_rng(forked), torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        random.setstate(python_state)
        np.random.set_state(numpy_state)
