"""The largest packs that fit a card, by the estimate of models/memory.py."""

from collections.abc import Mapping
from typing import Any

from foundry_ext.models.activations import count_layer
from foundry_ext.models.memory import estimate_memory, largest_pack
from foundry_ext.preflight.plan.model import PlannedModel
from foundry_ext.utils.nested import get


def largest_pack_tokens(config: Mapping[str, Any], memory: float) -> int:
    """Return the most tokens of a microbatch with which a run's step fits a card; 0 if none do.

    All tokens count as labelled, and gradients as accumulated, which is the larger estimate.

    Args:
        config: the run's resolved configuration.
        memory: bytes of the card.

    Raises:
        UserError: the model or the precision cannot be planned.
    """
    model = PlannedModel.of(config["model"])
    precision = str(config["precision"])
    compiled = get(config, "model.compile") not in (None, "none")
    layer = count_layer(model.build, precision=precision, compiled=compiled)
    sets = get(config, "callbacks.forgetting.sets") or {}

    def peak(tokens: int) -> int:
        return estimate_memory(
            model.config,
            layer,
            model.parameters,
            num_tokens=tokens,
            precision=precision,
            optimizer=str(config["optimizer"]["name"]),
            activation_checkpointing=bool(get(config, "model.activation_checkpointing")),
            frozen_copy=any((one or {}).get("kl") for one in sets.values()),
        ).peak

    return largest_pack(peak, memory)
