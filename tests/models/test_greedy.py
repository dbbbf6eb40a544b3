"""Greedy continuations equal those of transformers' Llama, token for token."""

import copy
import random

import pytest
import torch

from foundry_ext.models import greedy
from foundry_ext.models.greedy import generate_greedily
from tests.models.conftest import VOCABULARY

NEW_TOKENS = 14


@pytest.fixture
def pair(make_pair):
    return tuple(model.eval() for model in make_pair())


def draw(lengths, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(VOCABULARY) for _ in range(length)] for length in lengths]


def transformers_own(theirs, prompt, end_ids=()):
    """Return what stock generate continues the prompt with, alone and without a cache."""
    ids = torch.tensor([prompt])
    new = theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=list(end_ids) or None,
        pad_token_id=0,
        use_cache=False,
    )
    return new[0, len(prompt) :].tolist()


def ours_own(ours, prompts, end_ids=()):
    return generate_greedily(
        ours, prompts, max_new_tokens=NEW_TOKENS, has_ended=lambda ids: ids[-1] in end_ids
    )


@pytest.mark.parametrize("prefill_tokens", [1, 20, 8192])
@pytest.mark.parametrize("end_ids", [(), tuple(range(0, VOCABULARY, 9))], ids=["full", "ending"])
def test_prompts_are_continued_as_alone(pair, monkeypatch, prefill_tokens, end_ids):
    """Rows end at different steps and make room for others."""
    monkeypatch.setattr(greedy, "PREFILL_TOKENS", prefill_tokens)
    ours, theirs = pair
    prompts = draw([7, 1, 16, 5, 5, 3, 11, 9])
    found = ours_own(ours, prompts, end_ids)
    assert found == [transformers_own(theirs, prompt, end_ids) for prompt in prompts]
    assert len({token for row in found for token in row}) > 5, "too monotonous to show an error"
    lengths = {len(row) for row in found}
    assert lengths == {NEW_TOKENS} if not end_ids else len(lengths) > 3


def test_rows_that_have_ended_are_not_computed(pair, monkeypatch):
    ours, _ = pair
    computed = []
    layers = type(ours.model).forward

    def forward(self, hidden, *rest):
        computed.append(len(hidden))
        return layers(self, hidden, *rest)

    monkeypatch.setattr(type(ours.model), "forward", forward)
    prompts = draw([4, 6, 5])
    lasting = iter([1, 4, 2])
    longest = {}

    def has_ended(ids):
        return len(ids) >= longest.setdefault(ids[0], next(lasting, 9))

    found = generate_greedily(ours, prompts, max_new_tokens=9, has_ended=has_ended)
    assert len({row[0] for row in found}) == 3 and [len(row) for row in found] == [1, 4, 2]
    assert computed == [15, 2, 1, 1]


def test_autocast_and_bf16(pair, make_documents):
    """The cache holds the dtype that autocast gives the keys."""
    ours, _ = pair
    prompts = draw([7, 1, 16])
    with torch.autocast("cpu", torch.bfloat16):
        together = ours_own(ours, prompts)
        assert together == [ours_own(ours, [prompt])[0] for prompt in prompts]
    half = copy.deepcopy(ours).bfloat16()
    assert [len(row) for row in ours_own(half, prompts)] == [NEW_TOKENS] * 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(pair):
    ours, _ = pair
    ours.attention_backend = "sdpa"
    prompts = draw([7, 1, 16, 5])
    ends = tuple(range(0, VOCABULARY, 9))
    expected = ours_own(ours, prompts, ends)
    assert ours_own(ours.cuda(), prompts, ends) == expected
