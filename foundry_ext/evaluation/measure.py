"""All sets of a YAML, measured on one model without disturbing it."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from foundry_ext.evaluation.config import (
    DocumentsSettings,
    GenerationSettings,
    MultipleChoiceSettings,
    SetSettings,
)
from foundry_ext.evaluation.documents import DocumentsSet
from foundry_ext.evaluation.generation import GenerationSet
from foundry_ext.evaluation.metrics import Item, set_metrics
from foundry_ext.evaluation.multiple_choice import MultipleChoiceSet
from foundry_ext.evaluation.scoring import Shard
from foundry_ext.models.scores import BaseModel
from foundry_ext.models.smollm2 import SmolLM2ForCausalLM

# One rank's items -> those of all ranks.
Gather = Callable[[list[Item]], list[Item]]


class EvaluationSet(Protocol):
    """What can be measured."""

    @property
    def settings(self) -> SetSettings: ...

    @property
    def description(self) -> dict[str, Any]:
        """name, revision, fingerprint, documents, tokens, counts: for the run record."""
        ...

    def measure(
        self, model: SmolLM2ForCausalLM, base: BaseModel | None, shard: Shard
    ) -> list[Item]:
        """This rank's share, in any order."""
        ...

    def complete(self, gathered: Sequence[Item]) -> list[Item]:
        """The shares of all ranks -> a line an item, in order, "item" its key."""
        ...


def build_sets(
    settings: Sequence[SetSettings], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[EvaluationSet]:
    """Reads and encodes every set.

    Args:
        max_length: positions of the model; longer prompts are cut from the left.

    Raises:
        ValueError: a file or loader that cannot be read as what it is said to be.
    """
    return [_build(one, tokenizer, max_length) for one in settings]


def _build(
    settings: SetSettings, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> EvaluationSet:
    if isinstance(settings, DocumentsSettings):
        return DocumentsSet(settings, tokenizer)
    if isinstance(settings, MultipleChoiceSettings):
        return MultipleChoiceSet(settings, tokenizer, max_length)
    assert isinstance(settings, GenerationSettings)
    return GenerationSet(settings, tokenizer, max_length)


def measure(
    sets: Sequence[EvaluationSet],
    model: SmolLM2ForCausalLM,
    base: BaseModel | None,
    *,
    shard: Shard = Shard(),  # noqa: B008 - immutable
    gather: Gather = list,
) -> tuple[dict[str, float], list[Item]]:
    """Figures by `<set>/<metric>`, and items, which say of which "set" they are.

    The model is as it was afterwards, and so is the random state.

    Args:
        base: where to measure KL from; without it there is none.
        shard, gather: this process's part, and how it gets the others'; `gather` is called once a
            set, by every rank.
    """
    metrics: dict[str, float] = {}
    items: list[Item] = []
    with undisturbed(model):
        for one in sets:
            name = one.settings.name
            found = one.complete(gather(one.measure(model, base, shard)))
            metrics |= {f"{name}/{key}": value for key, value in set_metrics(found).items()}
            items += [{"set": name, **item} for item in found]
    return metrics, items


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; modes and random state are put back.

    A training that is measured in between takes the very steps of one that is not.
    """
    modes = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    forked = [device] if device.type == "cuda" else []
    python, numpy = random.getstate(), np.random.get_state()
    model.eval()
    try:
        with torch.random.fork_rng(forked), torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        random.setstate(python)
        np.random.set_state(numpy)
