"""Predicted times of a training step, and how far they are off on this processor.

    python benchmarks/roofline.py cards     # tokens/s of cards that nobody has measured
    python benchmarks/roofline.py here      # predicted against measured steps of this CPU

The prediction is foundry_ext/preflight/plan/roofline.py's. `here` measures the rates of this
processor first, on products, attention and passes of the sizes that a step has.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))  # run from a checkout, installed or not

from benchmarks import variants
from benchmarks.machine import as_line, describe_machine
from benchmarks.measure import seconds
from benchmarks.variants import METHODS, Bench, Setup
from benchmarks.workloads import Workload, packed_workload
from foundry_ext.models.activations import autocast
from foundry_ext.models.blockwise import blockwise_attention
from foundry_ext.models.loss import chunk_rows
from foundry_ext.models.memory import CARDS, optimizer_states
from foundry_ext.preflight.plan.model import PlannedModel
from foundry_ext.preflight.plan.operators import Op, Sample, fit, record
from foundry_ext.preflight.plan.roofline import Device, Microbatch, Step, card, predict
from foundry_ext.preflight.plan.work import StepWork, count_work
from foundry_ext.utils.allocator import keep_freed_memory

TOKENS = 16_384
OPTIMIZER = "fused_adamw"


def planned(method: str, size: str = "smollm2-135m", **overrides: Any) -> PlannedModel:
    adapter = METHODS[method]
    peft = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 64, "lora_alpha": 128}
    section = {"name": "smollm2_packed", "pretrained_model_name_or_path": size}
    section["config_overrides"] = overrides  # pyright: ignore[reportArgumentType]
    return PlannedModel.of(section | ({} if adapter is None else {"peft_config": peft | adapter}))


def work_of(model: PlannedModel, precision: str, *, compiled: bool) -> StepWork:
    return count_work(
        model.build,
        vocabulary=model.config.vocab_size,
        hidden=model.config.hidden_size,
        precision=precision,
        compiled=compiled,
    )


def our_step(
    device: Device, model: PlannedModel, work: StepWork, workload: Workload, *, kind: str
) -> Step:
    """Predict our step; `kind` is cuda or cpu."""
    return predict(
        device,
        work,
        model.config,
        Microbatch(
            num_tokens=workload.num_tokens,
            num_loss_tokens=workload.num_loss_tokens,
            sum_squared_lengths=workload.sum_squared_lengths,
        ),
        num_microbatches=1,
        chunk_rows=chunk_rows(model.config.vocab_size, kind),
        trained_bytes=model.parameters.trainable_bytes,
        optimizer_states=optimizer_states(OPTIMIZER),
        clips=False,
        trains_embedding=model.peft_config is None,
    )


def hf_work(config: LlamaConfig) -> tuple[list[Op], list[Op]]:
    """Return what transformers' Llama asks with one layer and with two, under amp_bf16."""

    def run(num_layers: int, num_tokens: int) -> list[Sample]:
        small = LlamaConfig(**{**config.to_dict(), "num_hidden_layers": num_layers})
        model = LlamaForCausalLM._from_config(small, attn_implementation="sdpa").train()
        ids = torch.zeros(1, num_tokens, dtype=torch.long)
        mask = torch.ones_like(ids)
        mask[0, -1] = 0  # without a zero, transformers would leave the mask out

        def work() -> None:
            with autocast("amp_bf16"):
                loss = model(input_ids=ids, attention_mask=mask, labels=ids).loss
            loss.backward()

        return record(work)

    one, two = (fit(run(n, 64), run(n, 128), (64, 128)) for n in (1, 2))
    return one, two


def hf_step(
    device: Device, work: tuple[list[Op], list[Op]], config: LlamaConfig, workload: Workload
) -> Step:
    """Predict transformers' full fine-tuning of the same documents, in padded rows of four.

    Its attention has a mask, so it computes all S x S scores of a row.
    """
    one, two = work
    lengths = [len(document.input_ids) for document in workload.documents]
    batches = [lengths[first : first + 4] for first in range(0, len(lengths), 4)]
    step, layers = Step(device), config.num_hidden_layers
    heads = config.num_attention_heads * config.head_dim
    for batch in batches:
        slots = len(batch) * max(batch)
        step.add(two, slots, layers - 1)
        step.add(one, slots, 2 - layers)
        step.add_one("attention", 3.5 * 4 * heads * max(batch) * slots, 0.0, layers)
    size = planned("full").parameters.trainable_bytes
    step.add_one("pass", 0.0, size * (2 + 1 + 4 + 3 * (len(batches) - 1)))
    return step


def cards() -> None:
    """Print predicted real tokens/s of every card."""
    methods = ("full", "lora", "dora", "rslora")
    config = planned("full").config
    workload = packed_workload(
        "a",
        vocabulary=config.vocab_size,
        labelled=1.0,
        pack_tokens=TOKENS,
        num_packs=1,
        microbatches=(4,),
    )
    theirs = hf_work(config)
    works = {
        (method, compiled): (model, work_of(model, "amp_bf16", compiled=compiled))
        for method in methods
        for compiled in (False, True)
        for model in [planned(method)]
    }
    print(f"135M, amp_bf16, rank 64, a pack of {workload.num_tokens:,} tokens, all labelled")
    print("predicted from counts; no such card has been measured; tokens/s, (ms of the step)")
    print("| card | HF padded |" + "".join(f" {m}, eager | {m} |" for m in methods))
    for name in CARDS:
        device = card(name)
        assert device is not None
        steps = {"HF padded": hf_step(device, theirs, config, workload)}
        for (method, compiled), (model, work) in works.items():
            title = method if compiled else f"{method}, eager"
            steps[title] = our_step(device, model, work, workload, kind="cuda")
        cells = [
            f"{workload.num_tokens / step.total / 1e3:,.1f}k ({1e3 * step.total:,.0f}"
            f"{', host' if step.total > step.seconds else ''})"
            for step in steps.values()
        ]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
        if name == next(iter(CARDS)):
            for title, step in steps.items():
                parts = {kind: f"{1e3 * value:.0f}" for kind, value in step.parts.items()}
                print(f"  {title}: {step.operators:,.0f} operators, ms by kind {parts}")


@dataclass(frozen=True)
class Case:
    """A step that is predicted and measured here."""

    name: str
    method: str = "full"
    precision: str = "fp32"
    lengths: str = "a"
    tokens: int = 2048
    labelled: float = 1.0
    model: str = "smollm2-135m"
    layers: int = 6


CASES = (
    Case("full"),
    Case("full, half labelled", labelled=0.5),
    Case("full, short documents", lengths="c"),
    Case("full, long documents, 4096 tokens", lengths="b", tokens=4096, layers=3),
    Case("LoRA", method="lora"),
    Case("DoRA", method="dora"),
    Case("360M, full", model="smollm2-360m", layers=3),
    Case("full, amp_bf16", precision="amp_bf16"),
    Case("DoRA, amp_bf16", method="dora", precision="amp_bf16"),
)


def typical(run: Callable[[], object]) -> float:
    """Return the median CPU-seconds of a run, after a warm-up."""
    run()
    return statistics.median(seconds(run, "cpu") for _ in range(5))


def rates(config: LlamaConfig, precision: str, num_tokens: int) -> Device:
    """Measure what this processor reaches, on the sizes of a step of this model."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    hidden, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    width, rows = config.intermediate_size, chunk_rows(config.vocab_size, "cpu")
    # Rows, inputs, outputs, and how often a step has the product.
    shapes = [(num_tokens, hidden, size, 1) for size in (hidden, hidden, kv, kv, width, width)]
    shapes += [(num_tokens, width, hidden, 1)]
    shapes = [(*shape[:3], config.num_hidden_layers) for shape in shapes]
    shapes += [(rows, hidden, config.vocab_size, num_tokens // rows)]
    flops = taken = 0.0
    for t, i, o, times in shapes:
        x, weight, y = (torch.randn(*size, dtype=dtype) for size in ((t, i), (o, i), (t, o)))
        # Forward, and the gradients of the input and of the weight.
        taken += times * typical(lambda: (x @ weight.t(), y @ weight, y.t() @ x))  # noqa: B023
        flops += times * 3 * 2.0 * t * i * o
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q = torch.randn(2048, heads, dim, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(2048, kv_heads, dim, dtype=dtype, requires_grad=True) for _ in range(2))
    ends = torch.tensor([0, 512, 1024, 1536, 2048], dtype=torch.int32)
    attention = 3.5 * 2 * 2 * heads * dim * 4 * 512**2 / 2
    a, b = torch.randn(num_tokens, width), torch.randn(num_tokens, width)
    tiny = torch.randn(8)
    return Device(
        product_flops=flops / taken,
        attention_flops=attention
        / typical(lambda: blockwise_attention(q, k, v, ends).sum().backward()),
        bandwidth=3 * a.nbytes / typical(lambda: a * b),
        host_seconds=typical(lambda: [tiny + tiny for _ in range(1000)]) / 1000,
        overlaps=False,
    )


def here() -> None:
    """Print predicted and measured CPU-seconds of each case."""
    torch.set_num_threads(1)
    keep_freed_memory()  # as train.py does; else fresh memory is mapped for every result
    print(as_line(describe_machine("cpu")))
    print("| case | tokens | predicted, CPU-s | measured | ratio | predicted by kind |")
    variants.RANK = 64
    for case in CASES:
        overrides = {"num_hidden_layers": case.layers}
        setup = Setup(
            model=case.model,
            method=case.method,
            precision=case.precision,
            backend="blockwise",
            config_overrides=overrides,
        )
        workload = packed_workload(
            case.lengths,
            vocabulary=setup.config().vocab_size,
            labelled=case.labelled,
            pack_tokens=case.tokens,
            num_packs=1,
            microbatches=(1,),
        )
        step = Bench(setup).step("ours_eager", workload, 1)
        measured = typical(step)
        model = planned(case.method, case.model, **overrides)
        work = work_of(model, case.precision, compiled=False)
        device = rates(model.config, case.precision, case.tokens)
        found = our_step(device, model, work, workload, kind="cpu")
        parts = {kind: round(value, 2) for kind, value in found.parts.items()}
        print(
            f"| {case.name} | {workload.num_tokens} | {found.total:.2f} | {measured:.2f} |"
            f" {found.total / measured:.2f} | {parts} |",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("cards", "here"))
    {"cards": cards, "here": here}[parser.parse_args().what]()
