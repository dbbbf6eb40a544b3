"""The work of a step, counted, and the time that follows from it.

tests/nullgpu compares the counts with those of a GPU, benchmarks/roofline.py the times with a CPU.
"""

import pytest
import torch
from torch import nn

from foundry_ext.models.flops import forward_flops
from foundry_ext.preflight.plan.model import PlannedModel
from foundry_ext.preflight.plan.operators import Op, fit, record
from foundry_ext.preflight.plan.roofline import Device, Microbatch, Step, card, predict
from foundry_ext.preflight.plan.work import count_work

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 100,
}
DEVICE = Device(product_flops=1e9, attention_flops=1e8, bandwidth=1e6)


def test_an_operator_takes_as_long_as_its_slowest_part():
    step = Step(Device(product_flops=1e9, attention_flops=1e8, bandwidth=1e6, least_seconds=1e-3))
    ops = [Op("product", (1e9, 1e6), (0.0, 0.0)), Op("pass", (0.0, 0.0), (0.0, 1e4))]
    step.add(ops, 100, times=2)
    assert step.parts == pytest.approx({"product": 2 * 1.1, "pass": 2 * 1.0})
    step.add_one("pass", 0.0, 1.0)
    step.add_one("attention", 1e8, 0.0)
    assert step.seconds == pytest.approx(3.2 + 1.0 + 1e-3 + 1.0) and step.operators == 6


def test_a_gpu_waits_for_its_host_and_a_cpu_is_it():
    rates = {"product_flops": 1e9, "attention_flops": 1e9, "bandwidth": 1e9, "host_seconds": 0.5}
    for overlaps, small, large in ((True, 0.5, 2.0), (False, 1.0, 2.5)):
        for flops, expected in ((5e8, small), (2e9, large)):
            step = Step(Device(**rates, overlaps=overlaps))
            step.add_one("product", flops, 0.0)
            assert step.total == pytest.approx(expected)


def test_recorded_operators():
    linear = nn.Linear(6, 4, bias=False)

    def run(rows: int):
        return record(lambda: linear(torch.ones(rows, 6)).relu_().view(-1).sum())

    ops = fit(run(64), run(128), (64, 128))
    assert [op.kind for op in ops] == ["pass", "product", "pass", "pass"]  # ones, mm, relu_, sum
    assert ops[1].at(10) == (2 * 10 * 6 * 4, 4 * (10 * 6 + 10 * 4 + 6 * 4))
    assert ops[2].at(10)[1] == 2 * 4 * 10 * 4, "read and written; the view is free"


@pytest.mark.parametrize("method", ["full", "dora"])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.more)])
def test_products_of_a_step_are_those_of_the_formula(method, compiled):
    adapter = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "use_dora": True}
    section = {"name": "smollm2_packed", "pretrained_model_name_or_path": "smollm2-135m"}
    section |= {"config_overrides": SHAPE} | ({"peft_config": adapter} if method == "dora" else {})
    model = PlannedModel.of(section)
    shape = {"vocabulary": 100, "hidden": 32, "precision": "fp32"}
    work = count_work(model.build, **shape, compiled=compiled)
    tokens = 640
    step = predict(
        Device(product_flops=1e9, attention_flops=1e9, bandwidth=float("inf")),
        work,
        model.config,
        Microbatch(num_tokens=tokens, num_loss_tokens=tokens, sum_squared_lengths=tokens**2),
        num_microbatches=1,
        chunk_rows=64,
        trained_bytes=1000,
        optimizer_states=2,
        clips=False,
        trains_embedding=method == "full",
    )
    parts = forward_flops(
        model.config, num_tokens=tokens, num_loss_tokens=tokens, sum_squared_lengths=tokens**2
    )
    assert step.parts["attention"] * 1e9 == pytest.approx(3.5 * parts["attention"])
    expected = 3 * (parts["linear"] + parts["head"])
    if method == "full":
        # The plan's model with a vocabulary of 8 has a small head of its own.
        assert step.parts["product"] * 1e9 == pytest.approx(expected, rel=0.02)
    else:
        assert 0.5 * expected < step.parts["product"] * 1e9 < 1.3 * expected


def test_compiled_layers_ask_for_fewer_passes():
    section = {"name": "smollm2_packed", "pretrained_model_name_or_path": "smollm2-135m"}
    model = PlannedModel.of({**section, "config_overrides": SHAPE})
    shape = {"vocabulary": 100, "hidden": 32, "precision": "amp_bf16"}
    work = count_work(model.build, **shape, compiled=True)
    layer = sum(op.kind == "pass" for op in work.two_layers) - sum(
        op.kind == "pass" for op in work.one_layer
    )
    fused = [op for op in work.compiled or () if op.kind == "pass"]
    assert 15 < len(fused) < 0.5 * layer


def test_cards_have_rates():
    slow, fast = card("RTX 3090 24 GB"), card("H100 80 GB")
    assert slow and fast and fast.product_flops > 5 * slow.product_flops
    assert card("GeForce 256") is None
