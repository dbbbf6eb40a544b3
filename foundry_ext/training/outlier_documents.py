"""The documents of a batch that give a wrong loss or gradient, found by measuring each alone."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from composer.core import State
from composer.core.precision import get_precision_context
from composer.utils import dist, model_eval_mode

from foundry_ext.data.dataset import PackedDataset
from foundry_ext.packing.batch import Pack
from foundry_ext.training.meter import unwrapped

MOST_DESCRIBED = 5  # documents with loss and gradient norm in a message
MOST_LISTED = 40  # documents by name only, if none stands out


class DocumentLoss(NamedTuple):
    """Loss and gradient of one document."""

    name: str
    loss: float
    """Summed over its loss tokens, in nats."""
    norm: float | None
    """Norm of its part of the batch's gradient; None if not measured."""

    @property
    def is_finite(self) -> bool:
        """True if loss and norm are finite."""
        return math.isfinite(self.loss) and math.isfinite(self.norm or 0.0)

    @property
    def weight(self) -> float:
        """Sort key of documents: the norm, or the loss if the norm was not measured."""
        return self.loss if self.norm is None else self.norm

    def __str__(self) -> str:
        norm = "" if self.norm is None else f", gradient norm {self.norm:.4g}"
        return f"{self.name} (loss {self.loss:.4g}{norm})"


def measure_documents(
    state: State, dataset: PackedDataset, *, measure_gradients: bool
) -> list[DocumentLoss]:
    """Measure every document of the current batch on all ranks. A collective.

    The model is in evaluation mode, so no random number is drawn. It takes about as long as the
    step did, or several times that if documents are short. Gradients cannot be measured under FSDP,
    whose backward pass sums over ranks.
    """
    batch = [int(index) for pack in dataset.sampler.batch(dataset.next_batch - 1) for index in pack]
    packs = [dataset[np.array([index])] for index in batch]
    tokens = dist.all_gather_object([pack["num_loss_tokens"] for pack in packs])
    num_loss_tokens = max(1, sum(map(sum, tokens)))
    model = unwrapped(state)
    documents = []
    with model_eval_mode(model), get_precision_context(state.precision):
        for index, pack in zip(batch, packs, strict=True):
            loss, norm = _measure(model, state.device.batch_to_device(pack), measure_gradients)
            norm = None if norm is None else norm / num_loss_tokens
            documents.append(DocumentLoss(dataset.name_document(index), loss, norm))
        for _ in range(len(packs), max(map(len, tokens))):
            # Under FSDP a forward pass is a collective, so every rank needs as many as the others.
            _measure(model, state.device.batch_to_device(dataset[np.array([], int)]), False)
    return [document for rank in dist.all_gather_object(documents) for document in rank]


def _measure(model: Any, pack: Pack, measure_gradient: bool) -> tuple[float, float | None]:
    """Return the summed loss of a pack of one document, and its gradient's norm."""
    with torch.set_grad_enabled(measure_gradient):
        loss = model(pack).loss * pack["num_loss_tokens"]
    if not measure_gradient:
        return loss.item(), None
    # Not by backward(), which would add to the step's gradients and trigger DDP's hooks.
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    norm = torch.nn.utils.get_total_norm([x for x in gradients if x is not None])
    return loss.item(), norm.item()


def describe_outliers(documents: Sequence[DocumentLoss]) -> str:
    """Return the documents that are not finite, or the ones of the largest gradient or loss."""
    bad = [document for document in documents if not document.is_finite]
    if bad:
        return f"caused by {_listed(list(map(str, bad)), MOST_DESCRIBED)}"
    ordered = sorted(documents, key=lambda document: document.weight, reverse=True)
    return (
        f"the largest of {len(documents)} documents, each measured alone:"
        f" {_listed(list(map(str, ordered)), MOST_DESCRIBED)};"
        f" all: {_listed([document.name for document in documents], MOST_LISTED)}"
    )


def _listed(texts: Sequence[str], most: int) -> str:
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more
