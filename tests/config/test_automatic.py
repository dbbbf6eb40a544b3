"""The values that `auto` gets on a machine."""

import pytest
from omegaconf import OmegaConf

from foundry_ext.config.automatic import (
    COMPILE,
    FIXED_SHAPE,
    LOSS,
    automatic_keys,
    compiles_on_gpu,
    in_effect,
    is_automatic,
    settle,
)

ON = {COMPILE: "layers", FIXED_SHAPE: True, LOSS: "compiled"}
OFF = {COMPILE: "none", FIXED_SHAPE: False, LOSS: "chunked"}
AUTO = dict.fromkeys(ON, "auto")


def a_config(**others):
    config = OmegaConf.create(
        {
            "model": {"name": "smollm2_packed"},
            "train_loader": {"name": "packed_finetuning", "dataset": {}},
            "precision": "amp_bf16",
        }
    )
    for key, value in others.items():
        OmegaConf.update(config, key, value)
    return config


def values(config):
    return {key: in_effect(config, key) for key in ON}


def is_open(config):
    return all(is_automatic(config, key) for key in ON)


@pytest.mark.parametrize("given", [{}, AUTO, dict.fromkeys(ON)], ids=["absent", "auto", "null"])
@pytest.mark.parametrize(("has_gpu", "expected"), [(True, ON), (False, OFF)], ids=["gpu", "cpu"])
def test_on_a_gpu_and_on_a_cpu(given, has_gpu, expected):
    config = a_config(**given)
    said = settle(config, has_gpu=has_gpu)
    assert values(config) == expected
    assert f"model.compile: {expected[COMPILE]}" in said
    assert ("minute" if has_gpu else "no GPU") in said
    if has_gpu or given == AUTO:
        assert not any(is_automatic(config, key) for key in ON)
    else:
        assert is_open(config), "defaults are not written down"


@pytest.mark.parametrize(
    ("given", "has_gpu", "expected"),
    [
        ({COMPILE: "none"}, True, OFF),
        ({FIXED_SHAPE: False}, True, OFF),
        ({FIXED_SHAPE: True}, True, ON),
        ({FIXED_SHAPE: True}, False, {**OFF, FIXED_SHAPE: True}),
        ({COMPILE: "model"}, True, {**ON, COMPILE: "model"}),
        ({COMPILE: "layers"}, False, {**ON, LOSS: "chunked"}),
        ({LOSS: "liger"}, True, {**ON, LOSS: "liger"}),
        ({"precision": "fp32"}, True, OFF),
        ({"model.attention_backend": "sdpa"}, True, OFF),
        ({"fsdp_config": {"sharding_strategy": "FULL_SHARD"}}, True, OFF),
    ],
)
def test_one_value_decides_the_others(given, has_gpu, expected):
    config = a_config(**given)
    settle(config, has_gpu=has_gpu)
    assert values(config) == expected
    for key, value in given.items():
        assert OmegaConf.select(config, key) == value


@pytest.mark.parametrize(
    "given", [{"model.name": "hf_causal_lm"}, {"train_loader.name": "finetuning"}]
)
def test_other_models_and_loaders_are_left_alone(given):
    config = a_config(**given)
    before = OmegaConf.to_container(config)
    assert automatic_keys(config) == []
    assert settle(config, has_gpu=True) == "" and OmegaConf.to_container(config) == before


def test_no_compiler_no_compilation(monkeypatch):
    """Triton builds its launchers with gcc."""
    monkeypatch.setattr("shutil.which", lambda _name: None)
    config = a_config()
    assert "no C compiler" in settle(config, has_gpu=True) and values(config) == OFF


def test_what_a_gpu_would_do_is_known_without_one():
    config = a_config()
    assert compiles_on_gpu(config) and is_open(config)
    assert not compiles_on_gpu(a_config(precision="fp32"))
    assert not compiles_on_gpu(a_config(**{"model.name": "hf_causal_lm"}))
