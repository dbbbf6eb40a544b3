"""Checks that weights are finite."""

import torch
from composer.core import State
from composer.utils import dist
from torch.distributed.tensor import DTensor

START_AGAIN = (
    "start again with a lower optimizer.lr and another save_folder, from the base model or, with"
    " load_path and load_weights_only: true, from an earlier checkpoint"
)


def describe_corrupted_weights(state: State) -> str:
    """Return `2 (layers.0.norm.weight, ...)` for weights that are not finite, or "". A collective.

    A weight counts if it is not finite on any rank.
    """
    named = list(state.model.named_parameters())
    shards = [p.to_local() if isinstance(p, DTensor) else p for _, p in named]
    with torch.no_grad():
        mine = [name for (name, _), p in zip(named, shards, strict=True) if not p.isfinite().all()]
    corrupted = sorted({name for rank in dist.all_gather_object(mine) for name in rank})
    return f"{len(corrupted)} ({', '.join(corrupted[:3])})" if corrupted else ""


def check_final_weights(state: State) -> None:
    """Check that a run's last steps left its weights finite. A collective.

    Nothing computes with the weights after the last step, so no loss would show that they are not.

    Raises:
        FloatingPointError: they are not; names them and the way out. Raised on all ranks.
    """
    corrupted = describe_corrupted_weights(state)
    if corrupted:
        raise FloatingPointError(
            f"after the last step, batch {state.timestamp.batch.value}, {corrupted} of the weights"
            f" are not finite: {START_AGAIN}"
        )
