"""The meaning of a peft_config, checked against the adapters that peft makes."""

import dataclasses
import math

import pytest
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from foundry_ext.adapters import methods
from foundry_ext.adapters.methods import check, method_of_config, scale_of, with_defaults
from foundry_ext.adapters.targets import LINEARS, matched_modules

LORA = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8}


def make_model():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    )


@pytest.fixture(scope="module")
def names():
    modules = make_model().named_modules()
    return [name for name, module in modules if isinstance(module, nn.Linear | nn.Embedding)]


def adapted(**settings):
    """Return {module: the adapter that peft puts there}."""
    model = get_peft_model(make_model(), LoraConfig(**with_defaults(LORA | settings)))
    modules = model.get_base_model().named_modules()
    return {name: module for name, module in modules if isinstance(module, LoraLayer)}


# --- method_of_config ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "name", "scale"),
    [
        ({}, "lora", 2.0),
        ({"use_dora": True}, "dora", 2.0),
        ({"use_rslora": True}, "rslora", 4.0),
        ({"use_dora": True, "use_rslora": True}, "dora_rslora", 4.0),
        ({"r": 64, "lora_alpha": 128, "use_rslora": True}, "rslora", 16.0),
    ],
)
def test_name_and_scale(settings, name, scale):
    method = method_of_config(LORA | settings)
    assert (method.name, method.effective_scale) == (name, scale)
    assert {layer.scaling["default"] for layer in adapted(**settings).values()} == {scale}


def test_full_fine_tuning_is_a_name_alone():
    full = method_of_config(None)
    assert full.name == "full"
    assert set(dataclasses.asdict(full).values()) == {"full", None}


def test_what_is_left_out_is_described_as_peft_fills_it():
    method, config = method_of_config({}), LoraConfig()
    assert (method.rank, method.alpha) == (config.r, config.lora_alpha)
    assert (method.init, method.dropout) == (config.init_lora_weights, config.lora_dropout)
    assert method.target_modules == LINEARS  # ours; peft's default is q_proj and v_proj


def test_a_set_of_targets_has_one_order():
    shuffled = {"target_modules": {"down_proj", "q_proj", "embed_tokens", "k_proj"}}
    assert method_of_config(shuffled).target_modules == (
        "q_proj",
        "k_proj",
        "down_proj",
        "embed_tokens",
    )


def test_scales_by_pattern_are_peft_s():
    patterns = {"rank_pattern": {"q_proj": 16, r"layers\.1\.mlp\..*": 2}, "use_rslora": True}
    patterns |= {"alpha_pattern": {r"1\.self_attn\.q_proj": 5}}
    layers = adapted(**patterns)
    scales = {name: layer.scaling["default"] for name, layer in layers.items()}
    assert {name: scale_of(LORA | patterns, name) for name in layers} == pytest.approx(scales)
    assert len(set(scales.values())) == 4
    assert scales["model.layers.1.self_attn.q_proj"] == 5 / math.sqrt(16)


# --- targets -------------------------------------------------------------------------------------

TARGETS = {
    "left out": {},
    "attention": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "mlp": {"target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "without gate_proj": {"target_modules": [name for name in LINEARS if name != "gate_proj"]},
    "full name": {"target_modules": ["model.layers.1.mlp.up_proj", "self_attn.q_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "regular expression": {"target_modules": r".*layers\.[02]\..*(q|up)_proj"},
    "one layer": {"layers_to_transform": 1},
    "layers": {"layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["gate_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}


@pytest.mark.parametrize("case", TARGETS)
def test_peft_adapts_the_modules_that_are_said_to_match(case, names):
    settings = TARGETS[case]
    check(LORA | settings, names)
    matched = matched_modules(LORA | settings, names)
    assert sorted(matched) == sorted(adapted(**settings))
    if case == "left out":
        assert len(matched) == 21
    if case == "without gate_proj":
        assert len(matched) == 18


# --- refused -------------------------------------------------------------------------------------

HEAD = "target_modules: lm_head .* tied .*; leave it out"
REFUSED = {
    "unknown key": ({"lora_apha": 8}, "unknown key 'lora_apha', did you mean 'lora_alpha'"),
    "far from any key": ({"banana": 8}, "unknown key 'banana'$"),
    "lost": ({"modules_to_save": ["embed_tokens"]}, "modules_to_save: embed_tokens would be"),
    "lost tokens": ({"trainable_token_indices": [3]}, "trainable_token_indices: 3 would be"),
    "task": ({"task_type": "SEQ_CLS"}, "task_type: SEQ_CLS .* CAUSAL_LM"),
    "type": ({"peft_type": "IA3"}, "peft_type: IA3 .* LORA"),
    "rank 0": ({"r": 0}, "peft_config.r: 0 must be .* 1 to 8192"),
    "half a rank": ({"r": 8.0}, r"peft_config.r: 8\.0 must be an integer"),
    "rank as text": ({"r": "8"}, "peft_config.r: '8'"),
    "true is no rank": ({"r": True}, "peft_config.r: True"),
    "alpha": ({"lora_alpha": -16}, "peft_config.lora_alpha: -16 must be a positive"),
    "no alpha": ({"lora_alpha": None}, "peft_config.lora_alpha: None"),
    "endless alpha": ({"lora_alpha": math.inf}, "peft_config.lora_alpha: inf"),
    "dropout": ({"lora_dropout": 1.0}, r"lora_dropout: 1\.0 must be .* below 1"),
    "switch": ({"use_dora": "yes"}, "use_dora: 'yes' must be true or false"),
    "biases": ({"bias": "all"}, "bias: 'all' .* leave it out"),
    "bias of B": ({"lora_bias": True}, "lora_bias: True adds a bias"),
    "init": ({"init_lora_weights": "olora"}, "init_lora_weights: 'olora' .* use true, gaussian"),
    "random init": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: 'pissa_niter_4'"),
    # peft trains the others without a warning.
    "one of many": (
        {"target_modules": ["q_proj", "gate_porj"]},
        "'gate_porj' matches no module, did you mean 'gate_proj'",
    ),
    "block": ({"target_modules": ["mlp"]}, "'mlp' matches no module"),
    "no target": ({"target_modules": []}, r"target_modules: \[\] must be a list"),
    "part of a name": (
        {"target_modules": "q_proj|v_proj"},
        r"'q_proj\|v_proj' matches no full module name, such as model\.embed_tokens",
    ),
    "broken expression": ({"target_modules": "(q_proj"}, r"'\(q_proj' .* regular expression"),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, HEAD),
    "head by expression": ({"target_modules": ".*(q_proj|head)"}, HEAD),
    "excluded in vain": ({"exclude_modules": ["o_porj"]}, "exclude_modules: 'o_porj'.*o_proj"),
    "nothing left": (
        {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
        "exclude_modules: q_proj excludes all",
    ),
    "layer": ({"layers_to_transform": [0, 3]}, "no target module in layer 3; .* 0, 1, 2"),
    "idle pattern": (
        {"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 2}},
        "rank_pattern: 'v_proj' matches none .* end in q_proj",
    ),
    "rank in a pattern": ({"rank_pattern": {"q_proj": 0}}, "rank_pattern.q_proj: 0"),
    "alpha in a pattern": ({"alpha_pattern": {"q_proj": -1}}, "alpha_pattern.q_proj: -1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case, names):
    settings, message = REFUSED[case]
    check(LORA, names)
    with pytest.raises(ValueError, match=message) as caught:
        check(LORA | settings, names)
    assert "\n" not in str(caught.value)


def test_every_key_of_peft_is_accepted_or_refused_for_a_reason(names):
    """Keys of a newer peft need a decision here. A configuration saved by peft passes."""
    known = methods._KEYS | methods._IDLE | methods._REFUSED.keys()
    assert known == {field.name for field in dataclasses.fields(LoraConfig)}
    check(LoraConfig(**with_defaults(LORA)).to_dict(), names)
