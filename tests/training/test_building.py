"""smollm2_packed from a YAML: accepted and refused settings, and the models built."""

import inspect
import pickle
import shutil

import pytest
import torch
from composer.utils import dist
from llmfoundry.models.hf.hf_causal_lm import ComposerHFCausalLM
from llmfoundry.models.utils import init_empty_weights
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config

from foundry_ext.models.smollm2 import SmolLM2ForCausalLM
from foundry_ext.training.model import ComposerSmolLM2
from tests.training import kit

CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="refused only without a GPU")


def lora(**settings):
    return {"peft_config": {**kit.LORA, **settings}}


def trained_parameters(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_the_registry_knows_it_and_loads_the_weights(world):
    model = kit.build(world)
    assert isinstance(model, ComposerSmolLM2)
    theirs = kit.make_llama()
    ours = dict(model.inner_model.named_parameters())
    for name, parameter in theirs.named_parameters():
        assert torch.equal(ours[name], parameter), name
    assert ours.keys() == dict(theirs.named_parameters()).keys()
    assert model.inner_model.generation_config.max_new_tokens == 77  # the folder's own
    assert model.get_metrics(is_train=True) == {}
    assert {"LanguageCrossEntropy", "LanguagePerplexity", "TokenAccuracy"} <= set(
        model.get_metrics(is_train=False)
    )


def test_takes_every_key_of_hf_causal_lm(world):
    """All but the two that choose an attention kernel, which attention_backend replaces."""
    keys = {
        name: parameter.default
        for name, parameter in inspect.signature(ComposerHFCausalLM).parameters.items()
        if name not in ("use_flash_attention_2", "attn_implementation", "tokenizer")
    }
    keys |= {"use_train_metrics": False, "pretrained_model_name_or_path": str(world.base)}
    kit.build(world, **keys)
    with pytest.raises(TypeError, match="attn_implementation"):  # named, so train.py can say so
        kit.build(world, attn_implementation="sdpa")


@pytest.mark.parametrize("shape", ["smollm2-135m", "smollm2-360m", "smollm2-1.7b"])
def test_a_shipped_shape_needs_no_network(world, shape):
    small = {"num_hidden_layers": 1, "hidden_size": 60, "num_attention_heads": 15}
    small |= {"num_key_value_heads": 5, "intermediate_size": 8, "vocab_size": kit.VOCABULARY}
    model = kit.build(
        world, pretrained_model_name_or_path=shape, pretrained=False, config_overrides=small
    )
    assert model.config.head_dim == 4  # 60 / 15, not the file's 64
    assert model.config.rope_theta in (100000, 130000)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_train_metrics": True}, "use_train_metrics: true"),
        ({"additional_train_metrics": ["token_accuracy"]}, "use_train_metrics"),
        ({"load_in_8bit": True}, "load_in_8bit"),
        ({"attention_backend": "fast"}, "attention_backend: 'fast'"),
        pytest.param({"attention_backend": "flash_attn"}, "needs a GPU", marks=CPU_ONLY),
        pytest.param({"attention_backend": "torch_varlen"}, "needs a GPU", marks=CPU_ONLY),
        ({"loss": "exact"}, "loss: 'exact'"),
        pytest.param({"loss": "liger"}, "liger' needs a GPU", marks=CPU_ONLY),
        (lora(modules_to_save=["embed_tokens"]), "modules_to_save"),
        (lora(modules_to_save=["lm_head"]), "modules_to_save"),
        (lora(trainable_token_indices=[3]), "trainable_token_indices"),
        (lora(init_lora_weights="olora"), "init_lora_weights: 'olora'"),
        (lora(target_modules=["q_proj", "lm_head"]), "target_modules: lm_head .* tied"),
        (lora(target_modules=".*(q_proj|head)"), "target_modules: lm_head .* tied"),
        (lora(target_modules=["nothing"]), "nothing"),
        (lora(peft_type="IA3"), "peft_type: IA3 .* LORA"),
        (lora(task_type="SEQ_CLS"), "task_type: SEQ_CLS .* CAUSAL_LM"),
        (lora(rank=4), "peft_config: .*rank"),
        (lora() | {"pretrained_lora_id_or_path": "x"}, "leave out peft_config"),
        (lora() | {"allow_embedding_resizing": True}, "allow_embedding_resizing"),
        ({"pretrained_model_name_or_path": "smollm2-135m"}, "HuggingFaceTB/SmolLM2-135M"),
        ({"init_device": "meta"}, "meta holds no weights"),
        ({"init_device": "gpu"}, "init_device: 'gpu'"),
        ({"config_overrides": {"num_hidden_layers": 3}}, "missing_keys: model.layers.2"),
        ({"config_overrides": {"num_hidden_layers": 1}}, "unexpected_keys: model.layers.1"),
        ({"config_overrides": {"intermediate_size": 64}}, "mismatched_keys"),
        ({"config_overrides": {"hidden_size": 64}}, "pretrained with 8"),
        ({"config_overrides": {"tie_word_embeddings": False}}, "missing_keys: lm_head.weight"),
        # Fits the weights and is another model nevertheless.
        (
            {"config_overrides": {"num_attention_heads": 8, "num_key_value_heads": 4}},
            "config_overrides.num_attention_heads: 8 .* pretrained with 4",
        ),
        ({"config_overrides": {"rope_scaling": {"rope_type": "linear"}}}, "rope_scaling"),
        ({"config_overrides": {"hidden_act": "gelu"}}, "hidden_act"),
    ],
)
def test_refuses(world, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        kit.build(world, **settings)
    assert "\n" not in str(caught.value)


def test_refuses_another_architecture(world, tmp_path):
    GPT2Config(n_layer=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a gpt2 model.*hf_causal_lm"):
        kit.build(world, pretrained_model_name_or_path=str(tmp_path))


@pytest.mark.parametrize("change", ["missing", "left over"])
def test_pretrained_weights_load_strictly(world, tmp_path, change):
    shutil.copytree(world.base, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    if change == "missing":
        del weights["model.layers.1.mlp.up_proj.weight"]
    else:
        weights["model.layers.1.mlp.up_proj.bias"] = torch.zeros(48)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"does not fit.*layers\.1\.mlp\.up_proj"):
        kit.build(world, pretrained_model_name_or_path=str(tmp_path))


@pytest.mark.parametrize("method", kit.METHODS)
def test_trains_the_right_number_of_parameters_with_the_head_tied(world, method):
    """Weights copied one by one would untie the head: 28 M more parameters at the 135M size."""
    model = kit.build(world, method=method)
    inner = model.inner_model
    assert inner.lm_head.weight is inner.model.embed_tokens.weight
    if method == "full":
        assert trained_parameters(model) == trained_parameters(kit.make_llama())
        return
    rank, layers = kit.LORA["r"], kit.SHAPE["num_hidden_layers"]
    shapes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    expected = layers * sum(rank * (into + out) for into, out in shapes)
    if method == "dora":
        expected += layers * sum(out for _, out in shapes)
    assert trained_parameters(model) == expected
    assert not inner.model.embed_tokens.weight.requires_grad


def test_an_untied_shape_keeps_two_matrices(world):
    small = {**kit.SHAPE, "tie_word_embeddings": False}
    model = kit.build(
        world,
        pretrained_model_name_or_path="smollm2-135m",
        pretrained=False,
        config_overrides=small,
    )
    inner = model.inner_model
    assert inner.lm_head.weight is not inner.model.embed_tokens.weight
    assert trained_parameters(model) == trained_parameters(kit.make_llama(**small))


def test_resized_embeddings_stay_tied(world):
    tokenizer = kit.load_tokenizer(world)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(100)])
    folder = str(world.base)
    with pytest.raises(ValueError, match="allow_embedding_resizing"):
        ComposerSmolLM2(tokenizer, folder)
    inner = ComposerSmolLM2(tokenizer, folder, allow_embedding_resizing=True).inner_model
    assert inner.lm_head.weight.shape[0] == len(tokenizer) > kit.VOCABULARY
    assert inner.lm_head.weight is inner.model.embed_tokens.weight


# --- devices (trap 11) ---------------------------------------------------------------------------


def test_meta_weights_are_all_initialised_as_fsdp_does_it(world):
    with init_empty_weights():
        model = kit.build(world, pretrained=False, init_device="meta")
    inner = model.inner_model
    assert all(parameter.is_meta for parameter in model.parameters())
    assert inner.lm_head.weight is inner.model.embed_tokens.weight
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    inner.tie_weights()
    for module in inner.modules():
        inner.param_init_fn(module)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        if name.endswith("norm.weight"):
            assert (parameter == 1).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.2, rel=0.1), name


def test_mixed_loads_on_rank_0_and_waits_on_the_others(world, monkeypatch):
    assert not any(p.is_meta for p in kit.build(world, init_device="mixed").parameters())
    monkeypatch.setattr(dist, "get_global_rank", lambda: 1)
    model = kit.build(world, init_device="mixed")
    assert all(parameter.is_meta for parameter in model.parameters())
    inner = model.inner_model
    assert inner.lm_head.weight is inner.model.embed_tokens.weight


# --- continuing an adapter, pickling -------------------------------------------------------------


@pytest.mark.parametrize("method", kit.ADAPTERS)
def test_continues_a_saved_adapter(world, tmp_path, method):
    first = kit.build(world, method=method)
    kit.randomise_adapter(first)
    first.model.save_pretrained(tmp_path)
    second = kit.build(world, pretrained_lora_id_or_path=str(tmp_path))
    assert trained_parameters(second) == trained_parameters(first)
    pairs = zip(first.model.named_parameters(), second.model.named_parameters(), strict=True)
    for (name, ours), (again, loaded) in pairs:
        assert name == again and torch.equal(ours, loaded), name
        assert loaded.requires_grad == ("lora_" in name)


def test_a_saved_adapter_is_checked_too(world, tmp_path):
    config = LoraConfig(**kit.LORA, modules_to_save=["norm"])
    get_peft_model(kit.make_llama(), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="modules_to_save"):
        kit.build(world, pretrained_lora_id_or_path=str(tmp_path))


@pytest.mark.parametrize(("layers", "problem"), [(1, "missing .*layers.1"), (3, "over .*layers.2")])
def test_a_saved_adapter_loads_strictly(world, tmp_path, layers, problem):
    """peft only warns of missing adapter weights and does not mention left-over ones."""
    get_peft_model(
        kit.make_llama(num_hidden_layers=layers), LoraConfig(**kit.LORA)
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"does not fit.*{problem}"):
        kit.build(world, pretrained_lora_id_or_path=str(tmp_path))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_pickles(world, method):
    """Classes registered by entry point can be imported when a pickle is read."""
    model = kit.build(world, method=method)
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is ComposerSmolLM2
    assert isinstance(again.inner_model, SmolLM2ForCausalLM)
    pack = kit.make_pack(kit.make_documents([5, 9]))
    assert torch.equal(again.eval()(pack).loss, model.eval()(pack).loss)
