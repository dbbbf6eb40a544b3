"""Shipped configurations, and loading and saving of weights."""

import json

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from foundry_ext.models.decoder import RMSNorm
from foundry_ext.models.smollm2 import SmolLM2ForCausalLM

# The model cards' numbers, not the files'.
SHIPPED = {
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rope_theta": 100_000,
    },
    "smollm2-360m": {
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "rope_theta": 100_000,
    },
    "smollm2-1.7b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "rope_theta": 130_000,
    },
}
COMMON = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_scaling": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
NUM_PARAMETERS = {
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def tied(request):
    return request.param


@pytest.fixture
def pair(tied, tiny_config, make_pair):
    ours, theirs = make_pair(tiny_config(tie_word_embeddings=tied))
    return ours.eval(), theirs.eval()


@pytest.fixture
def input_ids(make_documents):
    return torch.stack(make_documents([9, 9]))


def is_tied(model):
    return model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("shape", SHIPPED)
def test_shipped_shapes(shape, shipped_config):
    config = shipped_config(shape)
    for key, value in (COMMON | SHIPPED[shape]).items():
        assert getattr(config, key) == value, key


@pytest.mark.parametrize("shape", SHIPPED)
def test_shipped_shapes_build(shape, shipped_config):
    """On the meta device, so that 1.7B takes no memory."""
    with torch.device("meta"):
        ours = SmolLM2ForCausalLM(shipped_config(shape))
        theirs = LlamaForCausalLM(shipped_config(shape))
    ours.tie_weights()
    assert is_tied(ours)
    assert sum(parameter.numel() for parameter in ours.parameters()) == NUM_PARAMETERS[shape]
    our_shapes, their_shapes = (
        {name: x.shape for name, x in model.state_dict().items()} for model in (ours, theirs)
    )
    assert our_shapes == their_shapes


def test_state_dict_both_ways(pair, tied):
    ours, theirs = pair
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours_anew = SmolLM2ForCausalLM(ours.config)
    ours_anew.load_state_dict(theirs.state_dict(), strict=True)
    theirs_anew = LlamaForCausalLM(theirs.config)
    theirs_anew.load_state_dict(ours.state_dict(), strict=True)
    for model in (ours_anew, theirs_anew):
        for name, x in theirs.state_dict().items():
            assert torch.equal(model.state_dict()[name], x), name
        assert is_tied(model) == tied


def test_saved_by_us_loads_in_transformers(pair, tied, input_ids, tmp_path):
    """Trap 27: reading the folder must not need this package."""
    ours, _ = pair
    ours.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["architectures"] == ["LlamaForCausalLM"]
    assert saved["model_type"] == "llama"
    assert "auto_map" not in saved
    assert not {"attention_backend", "loss_implementation"} & saved.keys()
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs) is LlamaForCausalLM
    assert not any(report.values()), report
    assert is_tied(theirs) == tied
    assert (theirs(input_ids).logits - ours(input_ids).logits).abs().max() <= 1e-5


def test_saved_by_transformers_loads_in_ours(pair, tied, input_ids, tmp_path):
    _, theirs = pair
    theirs.save_pretrained(tmp_path)
    ours, report = SmolLM2ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert is_tied(ours) == tied
    assert (theirs(input_ids).logits - ours(input_ids).logits).abs().max() <= 1e-5


def test_round_trip(pair, tied, tmp_path):
    ours, _ = pair
    ours.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) != tied  # noqa: SIM118 - not a dict
    anew = SmolLM2ForCausalLM.from_pretrained(tmp_path)
    assert is_tied(anew) == tied
    for name, x in ours.state_dict().items():
        assert torch.equal(anew.state_dict()[name], x), name


def test_bf16_round_trip(pair, tmp_path):
    ours, _ = pair
    ours.bfloat16().save_pretrained(tmp_path)
    anew = SmolLM2ForCausalLM.from_pretrained(tmp_path, torch_dtype="auto")
    for name, x in ours.state_dict().items():
        assert anew.state_dict()[name].dtype == torch.bfloat16
        assert torch.equal(anew.state_dict()[name], x), name


def test_tie_survives_a_step(pair, tied, input_ids):
    """Trap 23: one tensor in the optimizer, updated by the sum of both gradients."""
    ours, theirs = pair
    for model in pair:
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(input_ids, labels=input_ids).loss.backward()
        optimizer.step()
    assert is_tied(ours) == tied
    count = sum(1 for name, _ in ours.named_parameters() if "embed" in name or "lm_head" in name)
    assert count == (1 if tied else 2)
    for name, x in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], x, rtol=1e-5, atol=1e-6)


def test_tie_survives_a_resize(pair, tied):
    ours, _ = pair
    ours.resize_token_embeddings(140, mean_resizing=False)
    assert is_tied(ours) == tied
    assert ours.lm_head.weight.shape[0] == ours.config.vocab_size == 140


def test_meta_device_initialisation(pair, tied, tiny_config):
    """Trap 11: FSDP materialises parameters unfilled and calls `_init_weights` on every module."""
    config = tiny_config(tie_word_embeddings=tied, attention_bias=True, initializer_range=0.03)
    with torch.device("meta"):
        ours = SmolLM2ForCausalLM(config)
    ours.to_empty(device="cpu")
    ours.tie_weights()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.fill_(float("nan"))
    for module in ours.modules():
        ours._init_weights(module)

    norms = [module for module in ours.modules() if isinstance(module, RMSNorm)]
    assert len(norms) == 2 * config.num_hidden_layers + 1
    assert all((norm.weight == 1).all() for norm in norms)
    for name, parameter in ours.named_parameters():
        assert parameter.isfinite().all(), name
        if parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(0.03, rel=0.05), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
    assert is_tied(ours) == tied
    assert not list(ours.buffers()), "a buffer would come back from meta unfilled"


def test_plain_initialisation_is_transformers(tiny_config):
    """The same numbers from the same seed: random runs are comparable with theirs."""
    models = []
    for build in (SmolLM2ForCausalLM, LlamaForCausalLM):
        torch.manual_seed(0)
        models.append(build(tiny_config()))
    for name, x in models[1].state_dict().items():
        assert torch.equal(models[0].state_dict()[name], x), name


def test_every_linear_is_a_plain_one(tiny_config):
    """peft finds its targets by class and name."""
    ours = SmolLM2ForCausalLM(tiny_config())
    linears = {name.rsplit(".", 1)[-1] for name, x in ours.named_modules() if type(x) is nn.Linear}
    projections = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    assert linears == projections | {"lm_head"}
