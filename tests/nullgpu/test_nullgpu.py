"""The GPU path on the null GPU: counts, waits, memory, compilation and emulated values.

Each test is one process with the null GPU, which takes most of the test's time, so it has many
cases.
"""

import json
from typing import Any

import pytest

from tests.nullgpu import kit

METHODS = ("full", "lora", "dora", "rslora")
GIB = 2**30

pytestmark = [
    pytest.mark.nullgpu,
    pytest.mark.more,
    pytest.mark.skipif(bool(kit.why_not()), reason=kit.why_not() or "it can be built"),
]


def steps(*cases: dict[str, Any], card: str = "RTX 3090") -> list[dict[str, Any]]:
    return kit.run("tests.nullgpu.steps", *map(json.dumps, cases), card=card)


def check_step(result: dict[str, Any]) -> None:
    """Check what holds for every step: nothing waits, and nothing is on the CPU."""
    assert result["waits"] == {}, result
    assert result["calls"]["wait"] == result["calls"]["copy_d2h"] == 0, result
    assert result["devices"] == ["cuda:0"]
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


def test_a_whole_model_fits_an_rtx_3090():
    """Bounds of the counts and of the memory, a tenth above what was counted in November 2026."""
    cases = [{"method": method, "warm_up": 2} for method in METHODS]
    bounds = {"full": (5_800, 18.6), "lora": (8_500, 15.8), "dora": (15_400, 17.6)}
    for result in steps(*cases):
        check_step(result)
        method = result["case"]["method"]
        most, peak = bounds.get(method, bounds["lora"])
        assert result["operations"] <= most, method
        assert result["peak_bytes"] <= peak * GIB, method
        assert result["reserved_bytes"] <= 0.95 * kit.CARDS["RTX 3090"].memory


def test_values_equal_the_cpu_s():
    """Worst gradients of amp_bf16 on the GPU and on the CPU differ alike from fp32's."""
    for result in kit.run("tests.nullgpu.values", *METHODS, NULLGPU_MOST_COPIED=str(2**34)):
        assert result["loss"] == pytest.approx(result["exact_loss"], rel=1e-3), result
        assert result["error"] < max(0.02, 1.3 * result["cpu_error"]), result
        if result["method"] == "full":
            assert result["exact_loss"] == pytest.approx(result["stock_loss"], rel=1e-5)
            assert result["stock_error"] < 1e-4


# Emulated are those with values; FlexAttention and Liger are Triton's, flash-attn is not installed.
EMULATED = ("models/test_attention.py", "models/test_loss.py", "models/test_padding.py")
EMULATED += ("models/test_smollm2_parity.py", "adapters/test_dora.py")
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
