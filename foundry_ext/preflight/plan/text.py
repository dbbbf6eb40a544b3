"""Text of a plan."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from foundry_ext.config import times
from foundry_ext.models.memory import (
    CARDS,
    CONTEXT_BYTES,
    GIB,
    HEAP_GROWTH,
    USABLE_SHARE,
    Memory,
    largest_pack,
    usable,
)
from foundry_ext.preflight.plan.plan import Plan, card_seconds
from foundry_ext.sweeps.text import duration

_NAMES = {
    "weights": "weights",
    "adapter": "adapter",
    "frozen_copy": "frozen copy for KL",
    "optimizer": "optimizer state",
    "gradients": "gradients",
    "activations": "activations",
    "weight_casts": "weights cast by autocast",
    "backward": "a layer's backward pass",
    "head": "gradient of the head",
    "chunk": "states and logits of the loss",
}


def format_plan(plan: Plan, *, memory: Mapping[str, float] | None = None) -> str:
    """Return the text that is printed; `memory` adds devices, as bytes by name."""
    parts = {
        "data": _data(plan),
        "run": _run(plan),
        "model": _model(plan),
        "memory": _memory(plan),
        "devices": _devices(plan, {**(memory or {}), **{k: v * GIB for k, v in CARDS.items()}}),
        "time": _time(plan),
    }
    lines = [f"plan of {plan.name}: nothing is trained"]
    for title, body in parts.items():
        lines += ["", title, *(f"  {line}" for line in body)]
    return "\n".join(lines)


def _data(plan: Plan) -> list[str]:
    epoch = plan.epoch
    lines = [
        f"{epoch.num_documents:,} documents, {epoch.num_tokens:,} tokens per epoch,"
        f" {100 * epoch.num_loss_tokens / epoch.num_tokens:.1f} % of them carry loss; the longest"
        f" has {epoch.longest:,} of max_seq_len {epoch.max_seq_len:,}"
    ]
    lines += [lost_rows(source) for source in plan.sources]
    lines.append(
        f"{epoch.num_packs:,} packs of {epoch.capacity:,} tokens,"
        f" {100 * epoch.packing_efficiency:.2f} % full;"
        f" {epoch.num_batches:,} batches of {epoch.batch_packs:,}"
        + (f", the last one with {epoch.num_empty_packs} empty" if epoch.num_empty_packs else "")
    )
    return lines


def lost_rows(source: Mapping[str, Any]) -> str:
    """Return `rows.jsonl: 3 truncated, 7 tokens cut`."""
    counts = {key: value for key, value in source["counts"].items() if value and key != "kept"}
    text = ", ".join(f"{value:,} {key.replace('_', ' ')}" for key, value in counts.items())
    return f"{source['name']}: {text or 'nothing truncated, split or dropped'}"


def _run(plan: Plan) -> list[str]:
    schedule, totals, evaluations = plan.schedule, plan.schedule.totals, plan.evaluations
    lines = [
        f"{plan.config['max_duration']}: {schedule.steps:,} optimizer steps, {schedule.epochs:.2f}"
        f" epochs of {schedule.batches_per_epoch:,}; {totals.documents:,} documents in"
        f" {totals.packs:,} packs",
        f"{totals.real_tokens:,} real tokens, {totals.loss_tokens:,} of them carry loss;"
        f" {totals.slots:,} computed, padding included",
    ]
    scheduler = plan.config.get("scheduler") or {}
    if scheduler.get("t_warmup") is not None:
        end = (
            f"over after step {schedule.warmup_steps:,}"
            if schedule.warmup_steps is not None
            else "not over when the run ends, so the learning rate never reaches optimizer.lr"
        )
        lines.append(f"warm-up: t_warmup {scheduler['t_warmup']}, {end}")
    if evaluations.steps:
        sets = ", ".join(f"{name} {count:,}" for name, count in evaluations.tokens.items())
        lines.append(
            f"evaluation: {len(evaluations.steps)} times, after steps {_some(evaluations.steps)}"
            f"{_by_clock(plan, 'eval_interval')}; tokens each time: {sets or 'none'}"
        )
        if evaluations.generated:
            lines.append(f"and up to {evaluations.generated:,} generated, one after another")
    else:
        lines.append("evaluation: none")
    if schedule.saves:
        lines.append(f"checkpoints: {schedule.saves}{_by_clock(plan, 'save_interval')}")
    return lines


def _by_clock(plan: Plan, key: str) -> str:
    """Return `, and every 1h of training` for an interval that no step is known for, or ""."""
    time = times.parse(plan.config.get(key))
    is_by_clock = time is not None and time.unit == "sec" and time.number > 0
    return f", and every {plan.config[key]} of training" if is_by_clock else ""


def _some(steps: Sequence[int]) -> str:
    shown = [f"{step:,}" for step in steps]
    return ", ".join(shown if len(shown) < 8 else [*shown[:4], "...", shown[-1]])


def _model(plan: Plan) -> list[str]:
    method, parameters = plan.method, plan.parameters
    text = method.name
    if method.rank is not None:
        targets = method.target_modules
        where = targets if isinstance(targets, str) else ", ".join(targets or ())
        text += (
            f", rank {method.rank}, alpha {method.alpha:g}, effective scale"
            f" {method.effective_scale:g}, on {where}"
        )
    evaluated = plan.evaluations.total_flops
    total = plan.training_flops + evaluated
    return [
        f"{plan.model.name}: {text}",
        f"{parameters.trainable:,} parameters trained"
        f" ({100 * parameters.trainable / parameters.total:.2f} %), {parameters.frozen:,} frozen",
        f"{plan.training_flops:.3g} FLOPs to train, {evaluated:.3g} to evaluate"
        f" ({100 * evaluated / total:.1f} %), without generation",
    ]


def _memory(plan: Plan) -> list[str]:
    # Only a GPU trains in half precision.
    on_card = str(plan.config["precision"]) != "fp32"
    own, other = (
        plan.memory(plan.pack_tokens, checkpointing=checkpointing, on_card=on_card)
        for checkpointing in (plan.checkpointing, not plan.checkpointing)
    )
    state, opposite = ("with", "without") if plan.checkpointing else ("without", "with")
    layers, layer = plan.model.config.num_hidden_layers, plan.card_layer if on_card else plan.layer
    kind = "compiled layer" if on_card and plan.compiles_on_gpu else "layer"
    return [
        f"{gib(own.peak)} for packs of {plan.pack_tokens:,} tokens,"
        f" {plan.config['precision']}, {plan.config['optimizer']['name']}, {state} activation"
        f" checkpointing; {gib(other.peak)} {opposite} it",
        *_by_part(own),
        f"activations are {layer.per_token:,.0f} bytes per token and layer, {layers} layers:"
        f" counted on one {kind} of this model",
        "estimated; within 5 % of the allocator's peak on a CPU, and of torch's allocator for a GPU"
        " that computes nothing; no GPU was measured",
    ]


def _by_part(memory: Memory) -> list[str]:
    parts = {key: value for key, value in asdict(memory).items() if value}
    # Only the larger of the two exists at the peak.
    parts.pop("chunk" if memory.backward > memory.chunk else "backward", None)
    return [f"  {_NAMES[key]:<26} {gib(value):>10}" for key, value in parts.items()]


def gib(size: float) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:,.1f} MiB"


def _devices(plan: Plan, devices: Mapping[str, float]) -> list[str]:
    width = max(len(name) for name in devices)
    lines = [
        f"{'':<{width}}  {'this run':>9}  largest pack_tokens  {'checkpointed':>12}"
        f"  {'tokens/s':>9}  time"
    ]
    real_tokens = plan.schedule.totals.real_tokens
    trained = plan.training_flops / (plan.training_flops + plan.evaluations.total_flops)
    for name, size in devices.items():
        packs = [_largest(plan, size, checkpointing=on) for on in (False, True)]
        plain, checkpointed = (f"{size:,}" if size else "none" for size in packs)
        own = plan.memory(plan.pack_tokens, checkpointing=plan.checkpointing, on_card=True)
        fits = "fits" if own.peak <= usable(size) else "too large"
        seconds = card_seconds(plan, name)
        taken, speed = "-", "-"
        if seconds is not None:
            taken, speed = duration(seconds), f"{real_tokens / (seconds * trained):,.0f}"
        lines.append(
            f"{name:<{width}}  {fits:>9}  {plain:>19}  {checkpointed:>12}  {speed:>9}  {taken}"
        )
    lines += [
        f"tokens/s and time{' of compiled layers' if plan.compiles_on_gpu else ''} are predicted"
        " from counts; no such card has been measured",
        f"assumed: CUDA's context takes {CONTEXT_BYTES / GIB:g} GiB, and"
        f" {USABLE_SHARE:.0%} of the rest can be used; no GPU was measured",
    ]
    batch = plan.epoch.batch_packs * plan.pack_tokens
    for name in ("RTX 3090 24 GB", "H100 80 GB"):
        largest = _largest(plan, devices[name], checkpointing=plan.checkpointing)
        lines += _advice(name, batch, largest, plan)
    return lines


def _largest(plan: Plan, size: float, *, checkpointing: bool) -> int:
    """Return the tokens of the largest pack; 0 if the longest document might not fit."""

    def peak(tokens: int) -> int:
        return plan.memory(tokens, checkpointing=checkpointing, on_card=True).peak

    tokens = largest_pack(peak, size)
    return tokens if tokens >= plan.epoch.max_seq_len else 0


def _advice(card: str, batch: int, largest: int, plan: Plan) -> list[str]:
    """Suggest the largest pack that fits and divides the batch's tokens evenly."""
    if not largest:
        return []
    packs = math.ceil(batch / largest)
    while batch % packs:
        packs += 1
    size = batch // packs
    if size == plan.pack_tokens or size < plan.epoch.max_seq_len:
        return []
    return [
        f"{card}: pack_tokens {size:,} with global_train_batch_size {packs} keeps the batch at"
        f" {batch:,} tokens"
    ]


def _time(plan: Plan) -> list[str]:
    throughput, evaluations = plan.throughput, plan.evaluations
    seconds = throughput.training_seconds(plan.schedule)
    if seconds is None:
        return [
            f"{plan.config['precision']} trains on a GPU only; set precision=fp32 to train here"
        ]
    seconds /= plan.num_ranks
    tokens = plan.schedule.totals.real_tokens
    lines = [
        f"{duration(seconds)} of training steps on {throughput.device}"
        + (f", {plan.num_ranks} processes" if plan.num_ranks > 1 else "")
        + f": {tokens / seconds:,.0f} real tokens/s, {throughput.source}"
    ]
    if evaluations.steps and throughput.evaluation_seconds is not None:
        total = throughput.evaluation_seconds * len(evaluations.steps)
        lines.append(f"{duration(total)} of evaluation and checkpoints, by the same records")
    elif evaluations.steps:
        share = evaluations.total_flops / plan.training_flops
        lines.append(
            f"about {duration(seconds * share)} of evaluation by its FLOPs, without generation"
        )
    if throughput.kind == "cpu":
        peak, own = plan.own_memory.peak, plan.process_bytes
        lines.append(
            f"{gib(own + peak)} to {gib(own + peak * HEAP_GROWTH)} of memory here: {gib(own)} for"
            " Python, its imports and the data, the rest as above; packs of different sizes leave"
            " gaps in the C library's heap, which the larger figure counts"
        )
    return lines
