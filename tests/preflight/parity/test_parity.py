"""`foundry-ext parity`: equal models are within rounding, and a fault is named as its layer."""

import math

import pytest
import torch
from transformers import LlamaForCausalLM

from foundry_ext.models import smollm2
from foundry_ext.models.attention import BACKENDS, varlen_attention
from foundry_ext.models.smollm2 import SmolLM2ForCausalLM
from foundry_ext.preflight.parity import models
from foundry_ext.preflight.parity.activations import LAYER_PARTS, WHOLE, Site
from foundry_ext.preflight.parity.differences import FACTOR, difference
from foundry_ext.preflight.parity.parity import DTYPES
from foundry_ext.preflight.parity.text import format_parity
from tests.preflight.parity.kit import random_pair, run, scaled

ON_A_CPU = {"flex", "blockwise", "torch_cpu", "sdpa"}


def test_equal_models_are_within_rounding(pair):
    parity = run(pair, DTYPES, BACKENDS[1:])
    assert parity.beyond() == {}
    assert {(c.dtype, c.backend) for c in parity.columns} == {
        (dtype, backend) for dtype in DTYPES for backend in ON_A_CPU
    }
    assert parity.skipped.keys() == {
        (dtype, backend) for dtype in DTYPES for backend in ("flash_attn", "torch_varlen")
    }
    assert all(reason.startswith("needs a GPU") for reason in parity.skipped.values())
    for column in parity.columns:
        parts = set(LAYER_PARTS) - ({"gradient"} if column.backend == "flex" else set())
        assert set(column.parts("layer 2")) == {*parts, WHOLE}
        assert math.isfinite(sum(d.error + d.largest for d in column.differences.values()))
    text = format_parity(parity)
    assert "!" not in text.partition("\n\n")[2] and "within rounding" in text


def other_angles(_module, args):
    hidden, cos, *rest = args
    return hidden, cos.roll(1, 0), *rest


def leaking(_module, args):
    def attend(q, k, v):
        one_document = torch.tensor([0, len(q)], dtype=torch.int32)
        return varlen_attention(q, k, v, one_document, len(q), backend="sdpa")

    return *args[:3], attend, *args[4:]


def wrong_gradient(_module, args, output):
    return output + 0.1 * (args[0] - args[0].detach())


SUBMODULES = {
    "input_layernorm": "input_layernorm",
    "self_attn.k_proj": "k_proj",
    "self_attn.o_proj": "o_proj",
    "post_attention_layernorm": "post_attention_layernorm",
    "mlp": "mlp",
    "": "block",
}


@pytest.mark.parametrize("name", SUBMODULES)
def test_a_fault_in_a_module_is_named(pair, name):
    pair.ours.model.layers[1].get_submodule(name).register_forward_hook(scaled)
    assert next(iter(run(pair).beyond())) == Site("layer 1", SUBMODULES[name])


@pytest.mark.parametrize(
    ("fault", "part"), [(other_angles, "rope"), (leaking, "attention")], ids=["rope", "attention"]
)
def test_a_fault_in_what_a_layer_is_given_is_named(pair, fault, part):
    pair.ours.model.layers[1].register_forward_pre_hook(fault)
    assert next(iter(run(pair).beyond())) == Site("layer 1", part)


def test_a_wrong_gradient_alone_is_named(pair):
    pair.ours.model.layers[1].mlp.register_forward_hook(wrong_gradient)
    assert next(iter(run(pair).beyond())) == Site("layer 1", "gradient")


@pytest.mark.parametrize(
    ("module", "site"),
    [
        ("model.embed_tokens", Site("embedding", WHOLE)),
        ("model.norm", Site("final norm", "final norm")),
        ("lm_head", Site("logits", "logits")),
    ],
)
def test_a_fault_outside_the_layers_is_named(pair, module, site):
    pair.ours.get_submodule(module).register_forward_hook(scaled)
    assert next(iter(run(pair).beyond())) == site


def test_a_fault_in_what_connects_the_layers_is_found(pair, monkeypatch):
    """Every layer is right when it is given its input, as if the model passed wrong positions."""
    plain = SmolLM2ForCausalLM._run_packed

    def shifted(self, hidden, position_ids, cu_seqlens, max_seqlen):
        return plain(self, hidden, position_ids**2, cu_seqlens, max_seqlen)

    monkeypatch.setattr(SmolLM2ForCausalLM, "_run_packed", shifted)
    assert next(iter(run(pair).beyond())) == Site("layer 0", WHOLE)


def test_a_wrong_loss_is_found(pair, monkeypatch):
    plain = smollm2.linear_cross_entropy
    monkeypatch.setattr(
        smollm2, "linear_cross_entropy", lambda *args, **kwargs: plain(*args, **kwargs) * 1.001
    )
    assert next(iter(run(pair).beyond())) == Site("loss", WHOLE)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_an_error_beside_much_rounding_is_found_in_its_layer(pair, dtype):
    """After three layers in bf16 it is smaller than what rounding has added up to."""
    pair.ours.model.layers[1].mlp.register_forward_hook(lambda _m, _a, out: out * 1.08)
    (column,) = run(pair, [dtype]).columns
    assert column.first_beyond() == Site("layer 1", "mlp")
    assert not column.parts("layer 2")["block"].exceeds
    if dtype == "bf16":
        assert not column.differences[Site("logits", WHOLE)].exceeds


def test_the_bound_is_the_error_of_theirs():
    exact = torch.tensor([[3.0, 4.0], [0.0, 10.0]])
    theirs = exact + torch.tensor([[0.0, 0.01], [0.0, 0.0]])  # a five-hundredth of the first token
    site = Site("layer 0", "mlp")
    for times, exceeds in ((0.9 * FACTOR, False), (1.1 * FACTOR, True)):
        ours = exact - times * (theirs - exact)
        found = difference(site, ours, theirs, exact, torch.float32)
        assert found.rounding == pytest.approx(0.002, rel=1e-4)
        assert found.error == pytest.approx(times * 0.002, rel=1e-4)
        assert found.largest == pytest.approx((1 + times) * 0.01, rel=1e-4)
        assert found.mean == pytest.approx(found.largest / 4, rel=1e-4)
        assert found.exceeds == exceeds
    assert difference(site, exact * math.nan, theirs, exact, torch.float32).exceeds
    # Where theirs happens to be exact, a rounding of the dtype is no fault.
    assert not difference(site, exact * (1 + 2**-9), exact, exact, torch.bfloat16).exceeds
    assert difference(site, exact * (1 + 2**-9), exact, exact, torch.float32).exceeds


def test_a_loss_is_held_against_the_errors_of_all_tokens():
    """They cancel in theirs, and a loss is fp32 in every dtype."""
    exact = torch.tensor([[2.0], [4.0]])
    theirs = exact + torch.tensor([[0.003], [-0.003]])
    site = Site("loss", WHOLE)
    for error, exceeds in ((0.9 * FACTOR * 0.003, False), (1.1 * FACTOR * 0.003, True)):
        found = difference(site, torch.tensor([[3.0 + error]]), theirs, exact, torch.bfloat16)
        assert found.rounding == pytest.approx(0.001, rel=1e-3)
        assert found.largest == found.mean == pytest.approx(error, rel=1e-3)
        assert found.exceeds == exceeds


def test_the_wider_model_rounds_nowhere_to_its_dtype(pair):
    """Its norms are computed in its own dtype, where transformers' would round to fp32."""
    exact = models.in_wider_dtype(pair.theirs)
    x = torch.randn(4, 72, dtype=torch.float64)
    for norm in (exact.model.norm, exact.model.layers[0].input_layernorm):
        expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
        torch.testing.assert_close(norm(x), expected, rtol=1e-14, atol=0)
    assert exact.lm_head.weight.dtype == torch.float64
    assert models.in_wider_dtype(pair.theirs.bfloat16()).lm_head.weight.dtype == torch.float32


def test_a_cast_rounds_weights_but_no_frequencies(pair):
    """`.bfloat16()` would round transformers' rotary frequencies; from_pretrained does not."""
    frequency = pair.theirs.model.rotary_emb.inv_freq
    cast = models.in_dtype(pair, torch.bfloat16, "cpu")
    assert torch.equal(cast.theirs.model.rotary_emb.inv_freq, frequency)
    assert not torch.equal(frequency.bfloat16().float(), frequency)
    assert cast.theirs.lm_head.weight.data_ptr() == cast.ours.lm_head.weight.data_ptr()
    assert pair.ours.lm_head.weight.dtype == torch.float32
    assert models.in_dtype(pair, torch.float32, "cpu") is pair


def test_a_dtype_that_overflows_in_theirs_is_skipped(pair):
    with torch.no_grad():
        pair.ours.model.layers[1].mlp.down_proj.weight.mul_(1e5)  # shared with theirs
    parity = run(pair, ["fp16", "fp32"])
    assert [column.dtype for column in parity.columns] == ["fp32"]
    assert "layer 1 is not finite" in parity.skipped["fp16", "sdpa"]


def test_weights_that_differ_are_not_shared(pair):
    theirs = LlamaForCausalLM(pair.ours.config)
    theirs.load_state_dict(pair.ours.state_dict())
    with torch.no_grad():
        theirs.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    assert next(iter(run(models._sharing(pair.ours, theirs)).beyond())) == Site("layer 1", "mlp")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    parity = run(random_pair(head_dim=64), DTYPES, BACKENDS[1:], num_tokens=300)
    assert parity.device == "cuda" and parity.beyond() == {}, format_parity(parity)
    compared = {(column.dtype, column.backend) for column in parity.columns}
    assert compared >= {("fp32", "sdpa"), ("fp32", "flex"), ("bf16", "torch_varlen")}
    assert "runs on a CPU only" in parity.skipped["fp32", "blockwise"]
