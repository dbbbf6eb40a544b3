"""Generation equals that of transformers' Llama, token for token."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache

from foundry_ext.models.smollm2 import SmolLM2ForCausalLM

NEW_TOKENS = 12
# Prompts of unequal lengths need padding; the shortest may be in the middle of a batch.
LENGTHS = [7, 1, 16, 5]


@pytest.fixture
def pair(make_pair):
    ours, theirs = (model.eval() for model in make_pair())
    for model in (ours, theirs):
        model.generation_config.pad_token_id = 0
    return ours, theirs


@pytest.fixture
def prompts(make_documents, make_padded):
    padded = make_padded(make_documents(LENGTHS), side="left")
    return {key: padded[key] for key in ("input_ids", "attention_mask")}


SETTINGS = {
    "greedy": {"do_sample": False},
    "greedy to an end token": {"do_sample": False, "eos_token_id": list(range(0, 131, 9))},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
    "sampling several": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"do_sample": False, "num_beams": 3},
}


def generate(model, prompts, **settings):
    torch.manual_seed(0)
    settings = {"max_new_tokens": NEW_TOKENS, "eos_token_id": None} | settings
    return model.generate(**prompts, **settings)


@pytest.mark.parametrize("name", SETTINGS)
def test_generate(name, pair, prompts):
    ours, theirs = (generate(model, prompts, **SETTINGS[name]) for model in pair)
    assert torch.equal(ours, theirs)
    new = ours[:, prompts["input_ids"].shape[1] :]
    assert len(new.unique()) > 5, "too monotonous to show an error"


def test_one_prompt_without_a_mask(pair, make_documents):
    prompt = {"input_ids": make_documents([6])[0][None]}
    ours, theirs = (generate(model, prompt, do_sample=False) for model in pair)
    assert torch.equal(ours, theirs)


def test_rows_of_a_batch_are_generated_as_alone(pair, prompts, make_documents):
    ours, _ = pair
    together = generate(ours, prompts, do_sample=False)[:, -NEW_TOKENS:]
    for row, prompt in zip(together, make_documents(LENGTHS), strict=True):
        # Without a mask, generate would treat the 0 within a prompt as padding (trap 8).
        alone = {"input_ids": prompt[None], "attention_mask": torch.ones_like(prompt[None])}
        assert torch.equal(row, generate(ours, alone, do_sample=False)[0, -NEW_TOKENS:])


def test_the_cache_changes_nothing(pair, prompts):
    ours, _ = pair
    cached, uncached = (
        generate(ours, prompts, do_sample=False, use_cache=use_cache) for use_cache in (True, False)
    )
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("chunks", [[16], [1] * 16, [5, 1, 10]], ids=str)
def test_cached_logits(chunks, pair, prompts):
    """Prefill and decoding in pieces of any length, over left padding, without generate's help."""
    ours, theirs = pair
    real = prompts["attention_mask"].bool()
    with torch.no_grad():
        expected = theirs(**prompts).logits
        cache, pieces, end = DynamicCache(), [], 0
        for piece in prompts["input_ids"].split(chunks, dim=1):
            end += piece.shape[1]
            out = ours(
                piece, attention_mask=prompts["attention_mask"][:, :end], past_key_values=cache
            )
            assert out.past_key_values is cache
            pieces.append(out.logits)
    assert cache.get_seq_length() == 16
    assert (torch.cat(pieces, dim=1)[real] - expected[real]).abs().max() <= 1e-5
    assert torch.cat(pieces, dim=1).isfinite().all(), "padding sees itself, lest it give NaN"


def test_generate_in_bf16(pair, prompts):
    """Under autocast and with bf16 weights, the cache holds the kernel's dtype."""
    ours, theirs = pair
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(**prompts, use_cache=True)
        generate(ours, prompts, do_sample=False)
    assert out.past_key_values.key_cache[0].dtype == torch.bfloat16
    out = copy.deepcopy(ours).bfloat16()(**prompts, use_cache=True)
    expected = copy.deepcopy(theirs).bfloat16()(**prompts)
    real = prompts["attention_mask"].bool()
    assert (out.logits[real] - expected.logits[real]).abs().max() <= 0.25


def test_generate_through_peft(pair, prompts):
    config = {
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "init_lora_weights": False,
        "task_type": "CAUSAL_LM",
    }
    plain = generate(pair[0], prompts, do_sample=False)
    torch.manual_seed(0)
    ours, theirs = (get_peft_model(model, LoraConfig(**config)).eval() for model in pair)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for name in ("greedy", "sampling"):
        our_tokens, their_tokens = (
            generate(model, prompts, **SETTINGS[name]) for model in (ours, theirs)
        )
        assert torch.equal(our_tokens, their_tokens)
    assert not torch.equal(generate(ours, prompts, do_sample=False), plain)


def test_generation_after_training_mode(pair, prompts):
    """Composer generates between training steps, with gradient checkpointing perhaps on."""
    ours, _ = pair
    expected = generate(ours, prompts, do_sample=False)
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    ours.train()
    ours.eval()
    assert torch.equal(generate(ours, prompts, do_sample=False), expected)


def test_can_generate():
    """Trap 35: a plain PreTrainedModel cannot generate, and transformers does not warn."""
    assert SmolLM2ForCausalLM.can_generate()
