"""Predicted speed of the layouts that `foundry-ext inspect` shows."""

from dataclasses import replace
from typing import Any

from foundry_ext.data.dataset import PackedDataset
from foundry_ext.models.flops import adapter_parameters, training_flops
from foundry_ext.preflight.inspect.layouts import Layout, Layouts
from foundry_ext.preflight.plan.model import PlannedModel
from foundry_ext.preflight.plan.schedule import simulate_schedule
from foundry_ext.preflight.plan.throughput import check_precision, estimate_throughput
from foundry_ext.utils.errors import UserError, one_line


def predict_speeds(layouts: Layouts, config: dict[str, Any], train: PackedDataset) -> Layouts:
    """Add real tokens per second to the layouts of a run's training data.

    The packed layout's rate is the plan's: of finished runs like this one, or measured now on a few
    layers. The others do as many FLOPs per second as it does, so their rates follow from counts:
    padding costs what it computes. What several small launches cost more on a GPU is not counted.
    If a rate cannot be predicted, the result says why.
    """
    try:
        check_precision(config)
        model = PlannedModel.of(config["model"])
        schedule = simulate_schedule(train, config)
        estimate = estimate_throughput(config, model, train, schedule)
    except (UserError, OSError, RuntimeError) as error:  # also torch's, out of memory
        return replace(layouts, why_no_speed=one_line(str(error)))
    seconds = estimate.training_seconds(schedule)
    share = schedule.totals.loss_tokens / schedule.totals.real_tokens
    flops = [_flops(layout, model, share) for layout in layouts.layouts]
    speeds = [flops[0] / one for one in flops]
    if seconds is None:
        why = f"precision {config['precision']} trains on a GPU only, and here is none"
        return replace(layouts.with_speeds(speeds, None, ""), why_no_speed=why)
    device = f"{estimate.device}, {estimate.source}"
    return layouts.with_speeds(speeds, schedule.totals.real_tokens / seconds, device)


def _flops(layout: Layout, model: PlannedModel, loss_share: float) -> float:
    """Return the FLOPs of training on an epoch. All layouts compute the head at labels only."""
    return training_flops(
        model.config,
        num_tokens=layout.num_slots,
        num_loss_tokens=int(layout.num_tokens * loss_share),
        sum_squared_lengths=layout.sum_squared_lengths,
        frozen_base=model.peft_config is not None,
        adapter_parameters=adapter_parameters(model.without_weights()),
    )
