"""Methods beyond the four: PiSSA and LoRA+ by configuration, default and chosen targets."""

import copy
import json

import pytest
import torch
from composer import Trainer
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from foundry_ext.adapters import pissa
from foundry_ext.adapters.targets import LINEARS
from foundry_ext.checkpoints.export import export_checkpoint
from foundry_ext.evaluation import base_model as evaluation_base
from tests.training import kit

PISSA = {**kit.LORA, "init_lora_weights": "pissa"}
PATTERNS = {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {r"1\.mlp\.up_proj": 3}}
RUN = {
    "model__peft_config": PISSA,
    "scheduler": {"name": "linear_decay_with_warmup", "t_warmup": "2ba", "alpha_f": 0},
}


def peft(**settings):
    return {"peft_config": {**kit.LORA, **settings}}


def logits_of(model):
    ids = kit.make_pack(kit.make_documents([20]))["input_ids"]
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def their_logits(world, folder):
    """Load the adapter on the base model that it names, as a user of peft does."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(world.base)
    return logits_of(
        PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(world.base), folder)
    )


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """Return a PiSSA run of 8 batches, with a checkpoint after each and an export at the end."""
    folder = tmp_path_factory.mktemp("pissa")
    callbacks = {"spy": {}, "hf_export": {"folder": str(folder / "hf")}}
    return folder, kit.run(kit.run_config(world, folder, callbacks=callbacks, **RUN))


# --- targets -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "targets",
    [
        None,
        ["q_proj", "k_proj", "v_proj", "o_proj"],
        ["gate_proj", "up_proj", "down_proj"],
        [name for name in LINEARS if name != "gate_proj"],
    ],
    ids=["left out", "attention", "mlp", "without gate_proj"],
)
def test_targets_by_configuration(world, targets):
    settings = peft(target_modules=targets)
    if targets is None:
        del settings["peft_config"]["target_modules"]
    model = kit.build(world, **settings)
    names = {
        n.split(".lora_")[0].rpartition(".")[2]
        for n, p in model.named_parameters()
        if p.requires_grad
    }
    assert names == set(targets or LINEARS)


def test_a_misspelt_target_among_others_is_refused(world):
    """peft would train the others without a warning."""
    get_peft_model(
        kit.make_llama(), LoraConfig(**peft(target_modules=["q_proj", "vproj"])["peft_config"])
    )
    with pytest.raises(ValueError, match="'vproj' matches no module, did you mean 'v_proj'"):
        kit.build(world, **peft(target_modules=["q_proj", "vproj"]))


def test_attention_dropout_from_the_yaml(world):
    settings = {"config_overrides": {"attention_dropout": 0.2}}
    model = kit.build(world, **settings)
    pack = kit.make_pack(kit.make_documents([9, 4]))
    plain = kit.build(world)
    # To rounding, because a backend that can drop attention weights is used throughout.
    torch.testing.assert_close(model.eval()(pack).loss, plain.eval()(pack).loss)
    assert model.train()(pack).loss != plain.train()(pack).loss
    with pytest.raises(ValueError, match=r"'flex' .* attention_dropout"):
        kit.build(world, **settings, attention_backend="flex")


def test_size_and_scale_are_logged_with_a_run(world, tmp_path):
    settings = {"max_duration": "1ba", "save_folder": None, "log_config": True}
    for method, scale in {"full": None, "lora": 2.0, "rslora": 4.0}.items():
        record = {"path": str(tmp_path / f"{method}.json"), "experiment": "x"}
        settings["callbacks"] = {"spy": {}, "run_record": record}
        run = kit.run(kit.run_config(world, tmp_path, method, **settings))
        trained = sum(p.numel() for p in run.trainer.state.model.parameters() if p.requires_grad)
        assert run.logged("model/trainable_parameters") == [trained]
        assert run.all_logged("model/effective_scale").get("model/effective_scale") == (
            None if scale is None else [scale]
        )


# --- PiSSA ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, PATTERNS], ids=str)
def test_pissa_starts_as_the_base_model_from_its_largest_directions(world, settings):
    model = kit.build(world, **peft(init_lora_weights="pissa", **settings)).eval()
    base = logits_of(LlamaForCausalLM.from_pretrained(world.base))
    torch.testing.assert_close(logits_of(model.model), base, rtol=1e-4, atol=1e-4)
    layer = model.inner_model.model.layers[1].mlp.up_proj
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    weight = LlamaForCausalLM.from_pretrained(world.base).model.layers[1].mlp.up_proj.weight
    values = torch.linalg.svdvals(weight)[: kit.LORA["r"]]
    product = layer.scaling["default"] * (B @ A)
    torch.testing.assert_close(torch.linalg.svdvals(product)[: len(values)], values)
    with model.model.disable_adapter():
        assert (logits_of(model.model) - base).abs().max() > 0.1  # the residual, not the base


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, PATTERNS, {"use_rslora": True, **PATTERNS}], ids=str
)
def test_a_pissa_checkpoint_is_exported_as_a_lora_on_the_original_base(world, tmp_path, settings):
    model = kit.build(world, **peft(init_lora_weights="pissa", **settings)).eval()
    kit.randomise_adapter(model)
    trained = logits_of(model.model)
    Trainer(model=model, device="cpu", precision="fp32").save_checkpoint(str(tmp_path / "x.pt"))
    out = export_checkpoint(tmp_path / "x.pt", tmp_path / "out")
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"]) == (2 * kit.LORA["r"], True)
    torch.testing.assert_close(their_logits(world, out), trained, rtol=1e-4, atol=1e-4)
    assert model.model.peft_config["default"].init_lora_weights == "pissa"


def test_a_trained_pissa_is_exported(world, trained):
    """Callback and command write the same adapter, and it has an effect."""
    folder, run = trained
    ours = logits_of(run.trainer.state.model.model)
    torch.testing.assert_close(their_logits(world, folder / "hf"), ours, rtol=1e-4, atol=1e-4)
    out = export_checkpoint(kit.checkpoint(folder, 8), folder / "out")
    torch.testing.assert_close(their_logits(world, out), ours, rtol=1e-4, atol=1e-4)
    assert (ours - logits_of(LlamaForCausalLM.from_pretrained(world.base))).abs().max() > 0.1


def test_pissa_resumes_bit_for_bit(world, trained, tmp_path):
    folder, reference = trained
    path = str(kit.checkpoint(folder, 5))
    run = kit.run(kit.run_config(world, tmp_path, load_path=path, **RUN))
    assert run.losses == reference.losses[5:]
    for name, weight in run.weights.items():
        assert torch.equal(weight, reference.weights[name]), name


def test_pissa_resumes_where_the_decomposition_turns_out_differently(
    world, trained, tmp_path, monkeypatch
):
    """A run resumed where SVD gives other vectors continues as it would have.

    The residual is computed from the factors in the checkpoint.
    """
    folder, reference = trained
    svd = torch.linalg.svd

    def turned(*args, **settings):
        U, S, Vh = svd(*args, **settings)
        return U.roll(1, 1), S.roll(1, 0), Vh.roll(1, 0)

    monkeypatch.setattr(torch.linalg, "svd", turned)
    path = str(kit.checkpoint(folder, 5))
    run = kit.run(kit.run_config(world, tmp_path, load_path=path, **RUN))
    assert run.losses == pytest.approx(reference.losses[5:], rel=1e-4)
    moved = [n for n in run.weights if not torch.equal(run.weights[n], reference.weights[n])]
    assert any("base_layer" in name for name in moved)


def test_adapters_off_is_the_base_model(world, trained):
    model = copy.deepcopy(trained[1].trainer.state.model.model)
    base, before = logits_of(LlamaForCausalLM.from_pretrained(world.base)), logits_of(model)
    with pissa.adapters_off(model):
        torch.testing.assert_close(logits_of(model), base, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits_of(model), before)
    with evaluation_base.adapters_off(model)() as inner:  # the model that KL is measured from
        torch.testing.assert_close(logits_of(inner), base, rtol=1e-4, atol=1e-4)
    lora = kit.build(world, method="dora")
    kit.randomise_adapter(lora)
    with pissa.adapters_off(lora.model):
        torch.testing.assert_close(logits_of(lora.model), base)


def test_adapters_go_off_under_autocast_too(world, trained):
    """Autocast caches casts of parameters, which are outdated once their values are exchanged."""
    model = copy.deepcopy(trained[1].trainer.state.model.model)
    bf16 = {"device_type": "cpu", "dtype": torch.bfloat16}
    with torch.autocast(**bf16, cache_enabled=False):
        trained_logits = logits_of(model)
        with pissa.adapters_off(model):
            base = logits_of(model)
    with torch.autocast(**bf16):
        assert torch.equal(logits_of(model), trained_logits)
        with pissa.adapters_off(model):
            assert torch.equal(logits_of(model), base)
        assert torch.equal(logits_of(model), trained_logits)
    assert not torch.equal(base, trained_logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 40}, "peft_config.r: 40 exceeds the 32 singular values"),
        ({"use_dora": True}, "'pissa' does not work with use_dora"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "'pissa' .* target_modules: embed_tokens"),
    ],
)
def test_pissa_refuses(world, settings, message):
    with pytest.raises(ValueError, match=message):
        kit.build(world, **peft(init_lora_weights="pissa", **settings))


def test_a_saved_pissa_adapter_of_peft_is_refused(world, tmp_path):
    get_peft_model(kit.make_llama(), LoraConfig(**PISSA)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="needs the residual of its own base model"):
        kit.build(world, pretrained_lora_id_or_path=str(tmp_path))


# --- LoRA+ ---------------------------------------------------------------------------------------


def test_lora_plus_trains_b_at_its_own_rate(world, tmp_path):
    """LoRA+ (arXiv 2402.12354) by llm-foundry's parameter groups, under a scheduler.

    B has 16 times the learning rate of A.
    """
    lr, ratio = 1e-3, 16
    settings = {
        "optimizer__lr": lr,
        "optimizer__betas": [0.0, 0.0],  # every step is lr * sign(gradient)
        "optimizer__eps": 1e-30,
        "optimizer__param_groups": [{"param_str_match": "lora_B", "lr": ratio * lr}],
        "algorithms": {},
        "scheduler": {"name": "linear_decay_with_warmup", "t_warmup": "2ba", "alpha_f": 0},
        "max_duration": "6ba",
    }
    run = kit.run(kit.run_config(world, tmp_path, "rslora", **settings))
    (optimizer,) = run.trainer.state.optimizers
    rest, b = optimizer.param_groups
    assert len(b["params"]) == 2 * len(LINEARS)
    assert b["lr"] == pytest.approx(ratio * rest["lr"])
    assert 0 < rest["lr"] < lr  # the scheduler changes both
    assert b["initial_lr"] == pytest.approx(ratio * rest["initial_lr"])
    states = [torch.load(kit.checkpoint(tmp_path, batch), weights_only=False) for batch in (4, 5)]
    moved = {"lora_A": [], "lora_B": []}
    for name, value in states[1]["state"]["model"].items():
        step = (value - states[0]["state"]["model"][name]).abs().median().item()
        moved[next(side for side in moved if side in name)].append(step)
    medians = {side: sorted(steps)[len(steps) // 2] for side, steps in moved.items()}
    assert medians["lora_B"] == pytest.approx(ratio * medians["lora_A"], rel=0.01)


@pytest.mark.parametrize("method", kit.ADAPTERS)
def test_a_saved_adapter_s_configuration_can_be_pasted(world, tmp_path, caplog, method):
    """peft writes inference_mode: true, with which no parameter would be trained."""
    adapted = get_peft_model(kit.make_llama(), LoraConfig(**kit.METHODS[method]))  # pyright: ignore
    adapted.save_pretrained(str(tmp_path))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["inference_mode"] is True and len(saved) > 20
    model = kit.build(world, method=method, peft_config=saved)
    plain = kit.build(world, method=method)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == [name for name, p in plain.named_parameters() if p.requires_grad] != []
    assert "inference_mode: true, from a saved adapter, is taken as false" in caplog.text
    model(kit.make_pack(kit.make_documents([20]))).loss.backward()
    assert kit.gradients(model).keys() == set(trained)
