"""Merged models give the logits of their adapter, or the merge is refused."""

import json

import pytest
import torch
from composer import Trainer
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaForCausalLM

import foundry_ext.checkpoints.merge
from foundry_ext.adapters import methods
from foundry_ext.checkpoints.export import export_checkpoint
from foundry_ext.checkpoints.loading import CERTIFICATE, recorded_base
from foundry_ext.checkpoints.merge import compare_logits, merge_adapter
from foundry_ext.cli.main import main
from foundry_ext.utils.errors import UserError
from tests.training import kit

VARIANTS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "dora_rslora": {"use_dora": True, "use_rslora": True},
    "patterns": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 6},
        "alpha_pattern": {r"1\.mlp\.up_proj": 3},
    },
    "attention": {"target_modules": ["q_proj", "v_proj"]},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer_folder, make_rows):
    return kit.make_world(tmp_path_factory.mktemp("world"), tokenizer_folder, make_rows)


@pytest.fixture(scope="module")
def saved(world, tmp_path_factory):
    """Return saved(variant): (model, Composer's checkpoint, peft folder) of a strong adapter."""
    made = {}

    def get(variant, **settings):
        if variant not in made:
            folder = tmp_path_factory.mktemp(variant)
            config = {**kit.LORA, **VARIANTS.get(variant, {}), **settings}
            model = kit.build(world, peft_config=config).eval()
            kit.randomise_adapter(model)
            trainer = Trainer(model=model, device="cpu", precision="fp32")
            trainer.save_checkpoint(str(folder / "model.pt"))
            made[variant] = model, folder / "model.pt", folder / "hf"
            export_checkpoint(folder / "model.pt", folder / "hf")
        return made[variant]

    return get


IDS = kit.make_pack(kit.make_documents([40]))["input_ids"]


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def refused(match, *arguments, **settings):
    out = arguments[1]
    with pytest.raises(ValueError, match=match) as caught:
        merge_adapter(*arguments, **settings)
    assert not out.exists() and not list(out.parent.glob("*.partial"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("variant", [*VARIANTS, "pissa"])
def test_a_merged_adapter_is_the_model_it_was(world, saved, tmp_path, variant):
    """The merge equals our model, stock peft unmerged, and peft's own merge."""
    settings = {"init_lora_weights": "pissa"} if variant == "pissa" else {}
    model, checkpoint, folder = saved(variant, **settings)
    certificate = merge_adapter(checkpoint, tmp_path / "out")
    theirs, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert type(theirs) is LlamaForCausalLM and not any(report.values())
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    merged = logits(theirs)
    assert torch.equal(logits(kit.run_the_card(tmp_path / "out")["model"]), merged)
    torch.testing.assert_close(merged, logits(model.model), rtol=1e-4, atol=1e-4)
    adapted = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(world.base), folder)
    torch.testing.assert_close(merged, logits(adapted), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merged, logits(adapted.merge_and_unload()), rtol=1e-4, atol=1e-4)
    base = logits(LlamaForCausalLM.from_pretrained(world.base))
    assert (merged - base).abs().max() > 0.5
    for stage in ("merged_in_float32", "written"):
        assert 0 < certificate[stage]["largest"] < 1e-4
        assert certificate[stage]["argmax_agreement"] > 0.99
    assert certificate["base_to_adapted"]["largest"] > 0.5


def test_the_certificate_says_what_was_done(world, saved, tmp_path):
    _, _, folder = saved("patterns")
    certificate = merge_adapter(folder, tmp_path / "out")
    assert json.loads((tmp_path / "out" / CERTIFICATE).read_text()) == certificate
    assert certificate["base"] == str(world.base)
    assert (certificate["method"], certificate["dtype"]) == ("rslora", "float32")
    assert certificate["head_tied"] is True
    assert len(certificate["scales"]) == 14
    assert certificate["scales"]["model.layers.0.self_attn.q_proj"] == pytest.approx(8 / 6**0.5)
    assert certificate["scales"]["model.layers.1.mlp.up_proj"] == pytest.approx(3 / 4**0.5)
    assert certificate["scales"]["model.layers.0.mlp.up_proj"] == pytest.approx(8 / 4**0.5)
    assert certificate["text"]["built_in"] and certificate["text"]["tokens"] > 300
    assert certificate["versions"]["torch"] in torch.__version__
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"by at most {certificate['written']['largest']:.2g}" in card
    assert "some modules have others" in card and "Adapter (rsLoRA) merged into" in card
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("12 birds")["input_ids"] == kit.load_tokenizer(world)("12 birds")["input_ids"]


@pytest.mark.parametrize("variant", ["rslora", "dora"])
def test_bf16_is_merged_in_fp32_and_cast_once(saved, tmp_path, variant):
    """The error is that of rounding merged weights once; merging in bf16 would exceed it."""
    model, _, folder = saved(variant)
    certificate = merge_adapter(folder, tmp_path / "out", dtype="bfloat16")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", torch_dtype="auto")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    merge_adapter(folder, tmp_path / "exact")
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "exact").state_dict()
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, exact[name].bfloat16()), name
    assert certificate["merged_in_float32"]["largest"] < 1e-4
    assert 1e-4 < certificate["written"]["largest"] < 0.5
    found = compare_logits(list(logits(loaded.float())), list(logits(model.model)))
    assert found.largest < 0.5


def test_any_text_will_do(saved, tmp_path):
    certificate = merge_adapter(saved("lora")[2], tmp_path / "out", text="seven birds of the river")
    assert not certificate["text"]["built_in"] and 0 < certificate["text"]["tokens"] < 25
    refused("text to compare on is empty", saved("lora")[2], tmp_path / "b", text="")


# --- what the certificate is for -----------------------------------------------------------------


@pytest.mark.parametrize("variant", ["rslora", "dora", "lora"])
def test_a_merge_with_another_scale_is_caught(saved, tmp_path, monkeypatch, variant):
    """Merging tools are known to use alpha/r for rsLoRA, or alpha/sqrt(r) for the others."""
    right = methods.scale_of

    def wrong(config, module):
        return right({**config, "use_rslora": not config["use_rslora"]}, module)

    monkeypatch.setattr(methods, "scale_of", wrong)
    refused(
        "merging in float32 moves a logit by .* tolerance 0.001: nothing was written",
        saved(variant)[2],
        tmp_path / "o",
    )


def test_a_magnitude_left_out_is_caught(saved, tmp_path, monkeypatch):
    def plain(layer, scale):
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        return layer.get_base_layer().weight + scale * B @ A

    monkeypatch.setattr(foundry_ext.checkpoints.merge, "merged_weight", plain)
    merge_adapter(saved("lora")[2], tmp_path / "lora")
    refused("merging in float32 moves a logit", saved("dora")[2], tmp_path / "dora")


def test_bf16_does_not_hide_a_wrong_merge(saved, tmp_path, monkeypatch):
    """The fp32 step must meet fp32's tolerance, whatever error the cast adds."""
    right = methods.scale_of
    monkeypatch.setattr(methods, "scale_of", lambda *a: 1.01 * right(*a))
    refused("merging in float32", saved("lora")[2], tmp_path / "o", dtype="bfloat16")


def test_a_broken_file_is_caught(saved, tmp_path, monkeypatch):
    """The comparison reads the written file, not the model in memory."""
    save = LlamaForCausalLM.save_pretrained

    def spoil(self, *arguments, **settings):
        with torch.no_grad():
            self.model.layers[1].mlp.up_proj.weight[0] += 1
        save(self, *arguments, **settings)

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", spoil)
    refused("writing float32 moves a logit", saved("lora")[2], tmp_path / "o")


def test_the_tolerance_is_the_user_s(saved, tmp_path):
    refused("tolerance 0: nothing was written", saved("lora")[2], tmp_path / "o", tolerance=0.0)
    refused("writing bfloat16", saved("lora")[2], tmp_path / "o", dtype="bfloat16", tolerance=1e-5)
    refused("tolerance: -1", saved("lora")[2], tmp_path / "o", tolerance=-1.0)


# --- refused -------------------------------------------------------------------------------------


def test_another_base_model(world, saved, tmp_path):
    kit.make_llama(num_hidden_layers=1).save_pretrained(tmp_path / "short")
    refused(
        "does not fit the model", saved("lora")[2], tmp_path / "o", base=str(tmp_path / "short")
    )
    GPT2Config(n_layer=1).save_pretrained(tmp_path / "gpt2")
    refused(
        "gpt2 must be a Llama-shaped model, not gpt2",
        saved("lora")[2],
        tmp_path / "o",
        base=str(tmp_path / "gpt2"),
    )
    refused("nowhere cannot be loaded; .*--base", saved("lora")[2], tmp_path / "o", base="nowhere")
    refused("shape without weights", saved("lora")[2], tmp_path / "o", base="smollm2-135m")


def test_a_full_model(world, tmp_path):
    refused("nothing to merge", world.base, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    refused("neither adapter_config.json nor config.json", tmp_path / "empty", tmp_path / "out")


def test_an_adapter_on_the_tied_embedding(world, tmp_path):
    config = LoraConfig(**{**kit.LORA, "target_modules": ["embed_tokens", "q_proj"]})
    get_peft_model(kit.make_llama(), config).save_pretrained(
        tmp_path / "hf", save_embedding_layers=False
    )
    kit.load_tokenizer(world).save_pretrained(tmp_path / "hf")
    refused("does not name its base model; pass --base", tmp_path / "hf", tmp_path / "out")
    match = "embed_tokens has an adapter, .* tied head"
    refused(match, tmp_path / "hf", tmp_path / "out", base=str(world.base))


def test_a_folder_in_use(saved, tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match="is not empty"):
        merge_adapter(saved("lora")[2], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_command(saved, tmp_path, capsys):
    _, checkpoint, _ = saved("dora")
    text = tmp_path / "text.txt"
    text.write_text("seven birds of the river, slowly towards the light\n" * 9)
    command = ["merge", str(checkpoint), str(tmp_path / "out"), "--dtype", "bfloat16"]
    assert main([*command, "--text", str(text)]) == 0
    printed = capsys.readouterr().out
    assert "dora merged into" in printed and "bfloat16" in printed and "Logits differ" in printed
    assert json.loads((tmp_path / "out" / CERTIFICATE).read_text())["dtype"] == "bfloat16"
    assert main(command) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main(["merge", str(tmp_path / "no.pt"), str(tmp_path / "b")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_a_merged_model_names_its_base(saved, world, tmp_path):
    """So that `foundry-ext eval` can compare it with its base without being told."""
    _, _, adapter = saved("lora")
    merge_adapter(adapter, tmp_path / "merged")
    assert recorded_base(tmp_path / "merged") == str(world.base)
    (tmp_path / "merged" / CERTIFICATE).write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=CERTIFICATE):
        recorded_base(tmp_path / "merged")
