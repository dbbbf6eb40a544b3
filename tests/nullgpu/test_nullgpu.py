"""The GPU path on the null GPU: counts, waits, memory, compilation and emulated values.

Each test is one process with the null GPU, which takes most of the test's time, so it has many
cases.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import variants
from foundry_ext.models.activations import count_layer
from foundry_ext.models.memory import estimate_memory
from foundry_ext.preflight.plan.model import PlannedModel
from tests.nullgpu import kit

METHODS = ("full", "lora", "dora", "rslora")
GIB = 2**30
SIZE = ("variables.size=135m", "variables.data=metamathqa")

pytestmark = [
    pytest.mark.nullgpu,
    pytest.mark.more,
    pytest.mark.skipif(bool(kit.why_not()), reason=kit.why_not() or "it can be built"),
]


def steps(*cases: dict[str, Any], card: str = "RTX 3090") -> list[dict[str, Any]]:
    return kit.run("tests.nullgpu.steps", *map(json.dumps, cases), card=card)


def check_devices(result: dict[str, Any]) -> None:
    """Check that nothing waits, and that nothing is on the CPU."""
    assert result["waits"] == {}, result
    assert result["calls"]["wait"] == result["calls"]["copy_d2h"] == 0, result
    assert result["devices"] == ["cuda:0"]


def check_step(result: dict[str, Any]) -> None:
    """Check what holds for every step that is not a graph."""
    check_devices(result)
    assert result["calls"]["launch"] > 100 and result["calls"]["gemm"] > 20


def kernels(result: dict[str, Any], part: str) -> int:
    return sum(count for name, count in result["kernels"].items() if part in name)


def test_no_step_waits():
    small = {"layers": 2, "pack_tokens": 2048, "labelled": 0.5}
    cases = [
        {**small, "method": method, "activation_checkpointing": checkpointing}
        for method in METHODS
        for checkpointing in (False, True)
    ]
    cases += [{**small, "model": model} for model in ("smollm2-360m", "smollm2-1.7b")]
    *results, reads = steps(*cases, {**small, "reads_loss": True})
    (place,) = reads["waits"]  # a wait would be seen
    assert "tests/nullgpu/steps.py" in place and reads["calls"]["wait"] == 1
    for result in results:
        check_step(result)
        # auto takes torch's own flash attention under amp_bf16, in both passes.
        assert kernels(result, "flash_fwd") == 2 * (
            1 + result["case"].get("activation_checkpointing", False)
        )
        assert kernels(result, "flash_bwd_dq_dk_dv") == 2
        assert result["gemm_flops"] > 0
    for plain, checkpointed in zip(results[:8:2], results[1:8:2], strict=True):
        assert checkpointed["peak_bytes"] < plain["peak_bytes"]


@pytest.mark.parametrize("card", ["RTX 3090", "H100"])
def test_compiled_steps(card):
    """Inductor and ptxas compile for the card's SM; one graph serves all layers."""
    small = {"layers": 3, "pack_tokens": 2048, "compile": "layers", "warm_up": 3}
    cases = [{**small, "method": method} for method in ("full", "dora")]
    eager, *results = steps({**cases[0], "compile": "none"}, *cases, card=card)
    for result in results:
        check_step(result)
        assert result["calls"]["driver_launch"] > 20  # Triton's
        assert result["graphs"] >= 1 and result["graphs_later"] == 0
        assert result["graph_breaks"] == {}
    assert results[0]["operations"] < 0.8 * eager["operations"]


def test_the_whole_model_compiled_and_cuda_graphs():
    small = {"layers": 2, "pack_tokens": 2048, "loss": "compiled"}
    graphs = {"method": "lora", "compile": "layers", "compile_mode": "reduce-overhead"}
    whole, recorded = steps(
        {**small, "compile": "model", "warm_up": 3}, {**small, **graphs, "warm_up": 5}
    )
    for result in (whole, recorded):
        check_devices(result)
        assert result["graphs_later"] == 0 and result["graph_breaks"] == {}
    assert whole["calls"]["driver_launch"] > 20
    assert recorded["calls"]["graph_launch"] == 2 * 2, "a layer's two passes are a graph each"
    assert recorded["operations"] < 0.6 * whole["operations"]


def test_flex_attention_and_the_compiled_loss():
    """FlexAttention in bf16, and in the quickstart's fp32, where `auto` takes it.

    Other tests count torch_varlen and the chunked loss, and emulate sdpa, which reads lengths.
    flash-attn and Liger are not installed; the other backends are the CPU's.
    """
    small = {"layers": 2, "pack_tokens": 2048}
    tiny = {"vocab_size": 2048, "hidden_size": 128, "num_attention_heads": 2}
    tiny |= {"intermediate_size": 384, "num_key_value_heads": 1, "num_hidden_layers": 2}
    flex, quickstart, compiled = steps(
        {**small, "backend": "flex"},
        {"pack_tokens": 2048, "precision": "fp32", "config_overrides": tiny},
        {**small, "loss": "compiled"},
    )
    for result in (flex, quickstart, compiled):
        check_step(result)
        assert result["graphs_later"] == 0 and result["calls"]["driver_launch"] > 0
        assert bool(kernels(result, "flash")) == (result is compiled)


def test_a_whole_model_fits_an_rtx_3090():
    """Limits of operations and GiB: the aims for compiled steps where they are met, else the counts
    of November 2026 and a twentieth.
    """
    bounds = {
        ("full", "none"): (4_850, 17.6),
        ("lora", "none"): (7_000, 14.6),
        ("rslora", "none"): (7_000, 14.6),
        ("dora", "none"): (12_300, 16.5),
        ("full", "layers"): (2_200, 11.0),
        ("lora", "layers"): (3_700, 10.8),
        ("dora", "layers"): (5_200, 12.1),
    }
    cases = [
        {"method": method, "compile": scope, "loss": "chunked" if scope == "none" else "compiled"}
        for method, scope in bounds
    ]
    for result in steps(*cases):
        check_step(result)
        case = result["case"]
        most, peak = bounds[case["method"], case["compile"]]
        assert result["operations"] <= most, case
        assert result["peak_bytes"] <= peak * GIB, case
        assert result["reserved_bytes"] <= 0.95 * kit.CARDS["RTX 3090"].memory
        planned = estimated(case["method"], compiled=case["compile"] == "layers")
        assert 0.97 < planned / result["peak_bytes"] < 1.04, case


@pytest.mark.slow
def test_larger_models_fit_their_cards():
    """The packs are those of the shipped YAMLs."""
    compiled = {"compile": "layers", "loss": "compiled"}
    large = {**compiled, "model": "smollm2-1.7b", "pack_tokens": 16384}
    large["activation_checkpointing"] = True
    small_card = [{**compiled, "model": "smollm2-360m", "pack_tokens": 8192, "num_packs": 2}]
    small_card += [{**large, "method": method} for method in ("lora", "dora")]
    large_card = {**compiled, "model": "smollm2-1.7b", "pack_tokens": 8192, "num_packs": 2}
    for card, cases in (("RTX 3090", small_card), ("H100", [large_card])):
        for result in steps(*cases, card=card):
            check_step(result)
            assert result["reserved_bytes"] <= 0.95 * kit.CARDS[card].memory


def test_values_equal_the_cpu_s():
    """Worst gradients of amp_bf16 on the GPU and on the CPU differ alike from fp32's."""
    for result in kit.run("tests.nullgpu.values", *METHODS, NULLGPU_MOST_COPIED=str(2**34)):
        assert result["loss"] == pytest.approx(result["exact_loss"], rel=1e-3), result
        assert result["error"] < max(0.02, 1.3 * result["cpu_error"]), result
        if result["method"] == "full":
            assert result["exact_loss"] == pytest.approx(result["stock_loss"], rel=1e-5)
            assert result["stock_error"] < 1e-4


def test_evaluations():
    """A shared prefix costs no operation more, and generation reads its tokens once a step."""
    layers = 2
    found = kit.run("tests.nullgpu.evaluation", str(layers))
    for name in ("ARC, 0 shots", "ARC, 5 shots", "WinoGrande, 0 shots"):
        apart, shared = (found[f"{name}: {kind}"] for kind in ("apart", "shared"))
        assert shared["flash"] == apart["flash"] == layers
        assert shared["waits"] == apart["waits"], shared["places"]
        assert shared["operations"] <= apart["operations"]
        assert shared["gemm_flops"] < apart["gemm_flops"]
    for name in ("ARC, 0 shots", "ARC, 5 shots"):
        plain, fused = (found[f"{name}: {kind}"] for kind in ("shared", "fused"))
        assert fused["operations"] < 0.6 * plain["operations"]
        assert fused["waits"] == plain["waits"] and fused["gemm_flops"] == plain["gemm_flops"]
        assert fused["graphs"] == 3, "one each for norm, rotary and SwiGLU, for packs of any size"
    few, more = (found[f"generation: {new}"] for new in (3, 13))
    # The tokens of a step are read by the host, which decides which rows go on.
    steps = 10
    assert more["waits"] - few["waits"] <= 4 * steps, more["places"]


# Emulated are those with values; FlexAttention and Liger are Triton's, flash-attn is not installed.
EMULATED = ("models/test_attention.py", "models/test_loss.py", "models/test_padding.py")
EMULATED += ("models/test_smollm2_parity.py", "adapters/test_fast_linears.py")
EMULATED += ("models/test_shared_prefix.py", "models/test_greedy.py")
COUNTED = ("models/test_memory.py", "benchmarks/test_no_sync.py")


@pytest.mark.parametrize(
    ("files", "options"),
    [
        (EMULATED, ["-p", "tests.nullgpu.gpu_tests", "-k", "not (flex or liger or flash_attn)"]),
        (COUNTED, ["-k", "not layers"]),
    ],
    ids=["emulated", "counted"],
)
def test_the_tests_marked_gpu_pass(files: tuple[str, ...], options: list[str]):
    said = kit.output_of(
        *("pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", "-m", "gpu", *options),
        *(f"tests/{file}" for file in files),
    )
    assert "passed" in said and "skipped" not in said, said


YAMLS = "yamls/smollm2_{}.yaml"
OF_COMPOSER = "composer/trainer/trainer.py"


@pytest.mark.parametrize("method", ["full", "dora"])
def test_a_shipped_yaml_runs_compiled_and_waits_where_it_must(method: str):
    """auto turns compilation on; the guard waits once a step, and Composer for what it logs."""
    result = kit.run("tests.nullgpu.whole_runs", "counted", YAMLS.format(method), *SIZE)
    assert result["steps"] == 3 and result["devices"] == ["cuda:0"]
    assert result["compiled"] and result["settings"] == {"compile": "layers", "loss": "compiled"}
    assert "expandable_segments" in result["allocator"], "llm-foundry's setting is in force"
    ours = {place: n for place, n in result["waits"].items() if OF_COMPOSER not in place}
    streams = {place: n for place, n in ours.items() if place.startswith("cudaStreamSync")}
    assert sum(streams.values()) == 1 and all("callbacks/guard.py" in place for place in ours)
    # Four packs a step, a tenth above what was counted in November 2026.
    assert result["operations"] <= {"full": 9_300, "dora": 22_000}[method]


@pytest.mark.parametrize("method", ["full", "dora"])
def test_a_shipped_yaml_has_the_cpu_s_values(method: str, tokenizer_folder: Path):
    """All callbacks and evaluations run. Composer trains in fp32 on a CPU, here in amp_bf16."""
    case = ("emulated", YAMLS.format(method), str(tokenizer_folder), *SIZE)
    settings = {"NULLGPU_MOST_COPIED": str(2**34), "WANDB_MODE": "disabled"}
    on_gpu = kit.run("tests.nullgpu.whole_runs", *case, **settings)
    on_cpu = kit.run("tests.nullgpu.whole_runs", *case, card=None, **settings)
    assert on_gpu["environment"]["device_kind"] == "cuda"
    assert on_cpu["environment"]["device_kind"] == "cpu"
    for ours, theirs in zip(on_gpu["evaluations"], on_cpu["evaluations"], strict=True):
        assert ours["metrics"].keys() == theirs["metrics"].keys()
        losses = [key for key in ours["metrics"] if key.endswith(("/loss", "CrossEntropy"))]
        assert len(losses) >= 3
        for key in losses:
            assert ours["metrics"][key] == pytest.approx(theirs["metrics"][key], rel=2e-3), key


def test_the_quickstart_runs():
    """The base model and an adapter, with every callback and evaluation, exported and loaded."""
    base, adapted = kit.run(
        "tests.nullgpu.whole_runs", "quickstart", "dora.yaml", NULLGPU_MOST_COPIED=str(2**34)
    )
    for record in (base, adapted):
        assert record["status"] == "finished" and record["environment"]["device_kind"] == "cuda"
        assert all(value > 0 for value in record["evaluations"][-1]["metrics"].values())
    assert adapted["method"] == "dora"


def test_out_of_memory_is_explained_with_packs_that_fit():
    case = (YAMLS.format("full"), *SIZE, "variables.pack_tokens=65536", "global_train_batch_size=1")
    said = kit.run("tests.nullgpu.whole_runs", "explained", *case)
    found = re.search(r"pack_tokens 65536; try (\d+), and global_train_batch_size (\d+)", said)
    assert found and int(found[1]) * int(found[2]) == 65536, said
    packs = f"variables.pack_tokens={found[1]}", f"global_train_batch_size={found[2]}"
    again = kit.run("tests.nullgpu.whole_runs", "explained", *case[:-2], *packs)
    assert again is None


def estimated(method: str, *, compiled: bool) -> int:
    """Return the plan's peak for the step of `steps`: 135M, rank 64, one pack of 16,384 tokens."""
    adapter: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 64}
    adapter["lora_alpha"] = 128
    adapter |= variants.METHODS[method] or {}
    peft_config = {} if method == "full" else {"peft_config": adapter}
    name = {"name": "smollm2_packed", "pretrained_model_name_or_path": "smollm2-135m"}
    model = PlannedModel.of({**name, **peft_config})
    return estimate_memory(
        model.config,
        count_layer(model.build, precision="amp_bf16", compiled=compiled),
        model.parameters,
        num_tokens=16_384,
        precision="amp_bf16",
        optimizer="fused_adamw",
        accumulates=False,
    ).peak
