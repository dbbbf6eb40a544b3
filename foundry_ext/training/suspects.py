"""Which documents of a batch give a loss or gradient that is wrong: each is measured by itself."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from composer.core import State
from composer.core.precision import get_precision_context
from composer.utils import dist, model_eval_mode
from torch.distributed.tensor import DTensor

from foundry_ext.data.dataset import PackedDataset
from foundry_ext.packing.batch import Pack
from foundry_ext.training.meter import unwrapped

NAMED = 5  # documents in a message
LISTED = 40  # numbers, where no document stands out


class Suspect(NamedTuple):
    """A document. `loss`: summed nats; `norm`: of the gradient of that sum, over the batch's loss
    tokens, so its part in the batch's gradient; None where it was not measured."""

    name: str
    loss: float
    norm: float | None

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.norm or 0.0)

    @property
    def weight(self) -> float:
        return self.loss if self.norm is None else self.norm

    def __str__(self) -> str:
        norm = "" if self.norm is None else f", gradient norm {self.norm:.4g}"
        return f"{self.name} (loss {self.loss:.4g}{norm})"


def find_suspects(
    state: State, dataset: PackedDataset, *, measure_gradients: bool
) -> list[Suspect]:
    """All documents of the batch at hand on all ranks; to be called by all of them.

    In evaluation mode, so that no random number is drawn. Takes about as long as the step did, or
    some times that where documents are short.

    Args:
        measure_gradients: not under FSDP, whose backward pass adds up what ranks have.
    """
    batch = [int(index) for pack in dataset.sampler.batch(dataset.next_batch - 1) for index in pack]
    packs = [dataset[np.array([index])] for index in batch]
    tokens = dist.all_gather_object([pack["num_loss_tokens"] for pack in packs])
    num_loss_tokens = max(1, sum(map(sum, tokens)))
    model = unwrapped(state)
    found = []
    with model_eval_mode(model), get_precision_context(state.precision):
        for index, pack in zip(batch, packs, strict=True):
            loss, norm = _measure(model, state.device.batch_to_device(pack), measure_gradients)
            norm = None if norm is None else norm / num_loss_tokens
            found.append(Suspect(dataset.name_document(index), loss, norm))
        for _ in range(len(packs), max(map(len, tokens))):
            # Under FSDP a forward pass is of all ranks at once.
            _measure(model, state.device.batch_to_device(dataset[np.array([], int)]), False)
    return [suspect for rank in dist.all_gather_object(found) for suspect in rank]


def _measure(model: Any, pack: Pack, measure_gradient: bool) -> tuple[float, float | None]:
    """Summed loss, and the norm of its gradient, of a pack of one document."""
    with torch.set_grad_enabled(measure_gradient):
        loss = model(pack).loss * pack["num_loss_tokens"]
    if not measure_gradient:
        return loss.item(), None
    # Not backward(), which would add to the gradients and wake DDP.
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    norm = torch.nn.utils.get_total_norm([one for one in gradients if one is not None])
    return loss.item(), norm.item()


def describe_suspects(suspects: Sequence[Suspect]) -> str:
    """Those that are not finite; else those of the largest gradient, or loss."""
    bad = [one for one in suspects if not one.is_finite]
    if bad:
        return f"by {_listed(bad)}"
    names = [one.name for one in suspects[:LISTED]]
    more = f" and {len(suspects) - LISTED} more" if len(suspects) > LISTED else ""
    ordered = sorted(suspects, key=lambda one: one.weight, reverse=True)
    return (
        f"of {len(suspects)} documents, the largest alone {_listed(ordered)};"
        f" all: {', '.join(names)}{more}"
    )


def _listed(suspects: Sequence[Suspect]) -> str:
    more = f" and {len(suspects) - NAMED} more" if len(suspects) > NAMED else ""
    return ", ".join(map(str, suspects[:NAMED])) + more


def spoilt_weights(state: State) -> str:
    """`2 (layers.0.norm.weight, ...)`: the weights that are not finite on some rank, or ''."""
    named = list(state.model.named_parameters())
    shards = [p.to_local() if isinstance(p, DTensor) else p for _, p in named]
    with torch.no_grad():
        mine = [name for (name, _), p in zip(named, shards, strict=True) if not p.isfinite().all()]
    spoilt = sorted({name for rank in dist.all_gather_object(mine) for name in rank})
    return f"{len(spoilt)} ({', '.join(spoilt[:3])})" if spoilt else ""
