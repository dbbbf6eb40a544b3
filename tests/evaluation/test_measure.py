"""Measurements leave model and random state as they were; base models are what they should be."""

import random

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig

from foundry_ext.evaluation.base_model import BaseCopy, adapters_off, weights_fingerprint
from foundry_ext.evaluation.measure import undisturbed
from foundry_ext.evaluation.rows import few_shot_prompt
from foundry_ext.evaluation.scoring import Shard, evenly_spaced
from foundry_ext.models.smollm2 import SmolLM2ForCausalLM


def make_model(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    return SmolLM2ForCausalLM(config)


def drawn():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_modes_and_random_numbers_are_put_back():
    model = make_model().train()
    model.lm_head.eval()  # a part that was in evaluation mode stays so
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    expected = drawn()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    with pytest.raises(KeyError), undisturbed(model):
        assert not model.training and not torch.is_grad_enabled()
        drawn()
        raise KeyError
    assert drawn() == expected
    assert model.training and not model.lm_head.training and torch.is_grad_enabled()


def test_base_under_an_adapter():
    """The adapter is off inside and on again outside; frozen parameters stay frozen."""
    model = make_model().eval()
    pack = {
        "input_ids": torch.tensor([[3, 1, 4, 1, 5]]),
        "position_ids": torch.arange(5)[None],
        "cu_seqlens": torch.tensor([0, 5], dtype=torch.int32),
        "max_seqlen": 5,
    }
    before = model(**pack).logits
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"])).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(1.0)
    next(p for n, p in adapted.named_parameters() if "lora_A" in n).requires_grad_(False)
    needed = [parameter.requires_grad for parameter in adapted.parameters()]
    after = adapted(**pack).logits
    with adapters_off(adapted)() as base:
        torch.testing.assert_close(base(**pack).logits, before, rtol=0, atol=0)
    assert [parameter.requires_grad for parameter in adapted.parameters()] == needed
    torch.testing.assert_close(adapted(**pack).logits, after, rtol=0, atol=0)
    assert (after - before).abs().max() > 0.01


def test_copy_is_frozen_and_tied():
    model = make_model().train()
    base = BaseCopy(model)
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(1.0)
    with base() as copy:
        assert not torch.equal(copy.head_weight, model.head_weight)
        assert copy.lm_head.weight is copy.model.embed_tokens.weight and not copy.training
        assert not any(parameter.requires_grad for parameter in copy.parameters())
    base.retake(model)
    assert torch.equal(base.model.head_weight, model.head_weight)


def test_fingerprint_is_of_what_no_adapter_is_on():
    """Weights under an adapter are left out: PiSSA changes them, rounding by machine."""
    model = make_model()
    plain = weights_fingerprint(model)
    assert plain == weights_fingerprint(make_model()) != weights_fingerprint(make_model(seed=1))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    before = weights_fingerprint(adapted.get_base_model())
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "base_layer" in name:
                parameter.add_(1.0)
    assert weights_fingerprint(adapted.get_base_model()) == before


def test_shards_and_spacing():
    assert [list(Shard(rank, 3).of(5)) for rank in range(3)] == [[0, 3], [1, 4], [2]]
    assert evenly_spaced(5, 3).tolist() == [0, 2, 4]
    for at_most in (None, 5, 9):
        assert evenly_spaced(5, at_most).tolist() == [0, 1, 2, 3, 4]
    spread = evenly_spaced(1172, 300)
    assert len(set(spread.tolist())) == 300 and np.diff(spread).max() == 4


def test_solved_examples_are_others_and_always_the_same():
    examples = [f"example {index}" for index in range(6)]
    for index in range(6):
        prompt = few_shot_prompt(examples, index, 3)
        assert prompt == few_shot_prompt(examples, index, 3)
        shown = prompt.split("\n\n")
        assert shown.pop() == "" and len(set(shown)) == 3 and examples[index] not in shown
    assert few_shot_prompt(examples, 0, 0) == ""
    assert len({few_shot_prompt(examples, index, 1) for index in range(6)}) > 2
