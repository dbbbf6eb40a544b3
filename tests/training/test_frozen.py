"""frozen_dtype: bf16 against the same run with its base in fp32, under amp_bf16."""

import pytest
import torch
from composer import Trainer
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear as PeftLinear
from safetensors.torch import load_file
from torch import nn

from foundry_ext.adapters.lora import FastLoraLinear
from foundry_ext.checkpoints.export import export_checkpoint
from tests.training import kit

METHODS = ["lora", "dora", "rslora"]
AUTOCAST = torch.bfloat16


def build(world, method="lora", frozen_dtype="bf16", **settings):
    model = kit.build(world, method=method, frozen_dtype=frozen_dtype, **settings)
    kit.randomise_adapter(model)
    return model


def make_batch():
    return kit.make_pack(kit.make_documents([20, 9, 14]))


def step(model, dtype=AUTOCAST):
    """Return (loss, gradients) of one batch, with the same dropout each time."""
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype):
        loss = model(make_batch()).loss
    loss.backward()
    return loss, kit.gradients(model)


again = pytest.mark.parametrize(
    "settings", [{}, {"activation_checkpointing": True}], ids=["kept", "recomputed"]
)


@again
@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_the_same_step_to_the_last_bit(world, method, settings):
    (loss, gradients), (expected, theirs) = (
        step(build(world, method, frozen_dtype, **settings)) for frozen_dtype in ("bf16", "fp32")
    )
    assert torch.equal(loss, expected)
    assert gradients.keys() == theirs.keys() and gradients
    for name, gradient in gradients.items():
        assert torch.equal(gradient, theirs[name]), name


@again
def test_doras_step_is_as_exact(world, settings):
    """Norms and gain use the stored weight: roundings differ but are not larger."""
    model = build(world, "dora", "fp32")
    model(make_batch()).loss.backward()
    exact = kit.gradients(model)
    error = {}
    for frozen_dtype in ("bf16", "fp32"):
        _, gradients = step(build(world, "dora", frozen_dtype, **settings))
        assert gradients.keys() == exact.keys()
        differences = [(g - exact[n]).norm() / exact[n].norm() for n, g in gradients.items()]
        error[frozen_dtype] = torch.stack(differences).square().mean().sqrt()
    assert error["bf16"] < 1.5 * error["fp32"] < 0.15


def test_linears_without_an_adapter_too(world):
    """With [q_proj] only, the other six linears are frozen as well."""
    targets = {"peft_config": {**kit.LORA, "target_modules": ["q_proj"]}}
    models = [build(world, frozen_dtype=dtype, **targets) for dtype in ("bf16", "fp32")]
    types = {n: p.dtype for n, p in models[0].named_parameters() if p.ndim == 2}
    assert {n for n, t in types.items() if t == torch.float32} == {
        n for n in types if "lora_" in n or "embed_tokens" in n
    }
    (loss, gradients), (expected, theirs) = map(step, models)
    assert torch.equal(loss, expected)
    assert all(torch.equal(gradient, theirs[name]) for name, gradient in gradients.items())


@pytest.mark.parametrize("method", METHODS)
def test_what_is_cast(world, method):
    model = build(world, method)
    inner = model.inner_model
    adapted = [m for m in inner.model.layers.modules() if isinstance(m, LoraLayer)]
    assert len(adapted) == 7 * len(inner.model.layers)
    assert {m.get_base_layer().weight.dtype for m in adapted} == {torch.bfloat16}
    others = [p for n, p in model.named_parameters() if "base_layer" not in n]
    assert {p.dtype for p in others} == {torch.float32}  # norms, embedding, adapter
    assert inner.lm_head.weight is inner.model.embed_tokens.weight
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


class Kept:
    """Counter of bytes that a forward pass keeps for the backward pass, without parameters."""

    def __init__(self, model):
        self.known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.kept = {}

    def __call__(self, x):
        memory = x.untyped_storage()
        if memory.data_ptr() not in self.known:
            self.kept[memory.data_ptr()] = memory.nbytes(), x  # x, so that its memory is not reused
        return x

    @property
    def bytes(self):
        return sum(size for size, _ in self.kept.values())


def test_no_copy_is_kept_for_the_backward_pass(world, monkeypatch):
    """Autocast alone would keep a bf16 copy of LoRA's frozen weights (docs/concepts/methods.md)."""
    kept, held = {}, {}
    for dtype in ("bf16", "fp32"):
        model = build(world, peft_config=kit.LORA, frozen_dtype=dtype)
        count = Kept(model)
        with (
            torch.autograd.graph.saved_tensors_hooks(count, lambda x: x),
            torch.autocast("cpu", AUTOCAST),
        ):
            model(make_batch())
        kept[dtype] = count.bytes
        linears = [m.base_layer for m in model.modules() if isinstance(m, LoraLayer)]
        held[dtype] = sum(p.nbytes for m in linears for p in m.parameters())
        # The input of the first layer's q, k and v needs no gradient.
        frozen = sum(m.weight.numel() for m in linears[3:])
    assert held["fp32"] == 2 * held["bf16"]
    assert frozen and kept["fp32"] == kept["bf16"]
    with monkeypatch.context() as patched:  # with peft's own forward pass, it does
        patched.setattr(FastLoraLinear, "forward", PeftLinear.forward)
        count = Kept(model)
        with (
            torch.autograd.graph.saved_tensors_hooks(count, lambda x: x),
            torch.autocast("cpu", AUTOCAST),
        ):
            model(make_batch())
    assert count.bytes > kept["fp32"] + frozen


@pytest.mark.parametrize("method", METHODS)
def test_checkpoints_and_exports_know_nothing_of_it(world, tmp_path, method):
    exports, states = [], []
    for dtype in ("bf16", "fp32"):
        path = tmp_path / f"{dtype}.pt"
        model = build(world, method, dtype)
        Trainer(model=model, device="cpu", precision="fp32").save_checkpoint(str(path))
        states.append(torch.load(path, weights_only=False)["state"]["model"])
        out = export_checkpoint(path, tmp_path / dtype)
        exports.append(load_file(out / "adapter_model.safetensors"))
    for ours, theirs in (exports, states):
        assert ours.keys() == theirs.keys() and ours
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert not any("base_layer" in name for name in states[0])


@pytest.mark.gpu  # Composer refuses amp_bf16 on a CPU
def test_a_run_is_the_same(world, tmp_path):
    runs = [
        kit.run(
            kit.run_config(
                world,
                tmp_path / dtype,
                "lora",
                precision="amp_bf16",
                model__frozen_dtype=dtype,
                max_duration="3ba",
            )
        )
        for dtype in ("bf16", "fp32")
    ]
    assert runs[0].losses == runs[1].losses
    ours, theirs = (run.weights for run in runs)
    assert all(torch.equal(ours[n], theirs[n]) for n in ours if "lora_" in n)


# --- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"frozen_dtype": "bfloat16"}, "frozen_dtype: 'bfloat16' must be one of fp32, bf16"),
        ({"method": "full"}, "frozen_dtype: bf16 .* peft_config"),
        ({"init_device": "meta", "pretrained": False}, "init_device: meta"),
        ({"peft_config": {**kit.LORA, "init_lora_weights": "pissa"}}, "pissa"),
    ],
)
def test_refused_when_built(world, settings, match):
    with pytest.raises(ValueError, match=match):
        kit.build(world, **{"method": "lora", "frozen_dtype": "bf16", **settings})


def test_refused_without_autocast_to_bf16(world, tmp_path):
    model = build(world)
    with pytest.raises(ValueError, match="precision: amp_bf16"):
        model(make_batch())
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match="amp_bf16"):
        model(make_batch())
    with pytest.raises(ValueError, match="frozen_dtype: fp32"), model.model.disable_adapter():
        model.inner_model(input_ids=torch.zeros(1, 3, dtype=torch.long))
    config = kit.run_config(world, tmp_path, "lora", model__frozen_dtype="bf16")
    with pytest.raises(ValueError, match="precision: amp_bf16"):
        kit.run(config)


def test_fp32_is_the_default(world):
    linears = [m for m in kit.build(world, method="lora").modules() if isinstance(m, nn.Linear)]
    assert {m.weight.dtype for m in linears} == {torch.float32}
