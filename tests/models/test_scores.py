"""Scores of positions and documents equal those from all logits."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from foundry_ext.models import loss
from foundry_ext.models.scores import BaseStates, score_pack, score_positions

POSITIONS, HIDDEN, VOCABULARY = 23, 8, 61


def make_head(seed):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(POSITIONS, HIDDEN, generator=generator)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    return states, weight


@pytest.fixture
def targets():
    return torch.randint(0, VOCABULARY, (POSITIONS,), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("chunk", [1, 5 * VOCABULARY, 2**24])
def test_positions_are_those_of_the_logits(monkeypatch, targets, chunk):
    """Chunks that do not divide the rows evenly, of one row, and of all rows."""
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", chunk)
    states, weight = make_head(0)
    base_states, base_weight = make_head(1)
    targets[4] = (states @ weight.T)[4].argmax()
    found = score_positions(
        states, weight, targets, base_states=base_states, base_weight=base_weight
    )
    now, base = (states @ weight.T).log_softmax(-1), (base_states @ base_weight.T).log_softmax(-1)
    torch.testing.assert_close(found.log_prob, now.gather(1, targets[:, None])[:, 0])
    assert found.is_correct.tolist() == (now.argmax(-1) == targets).tolist() != [False] * POSITIONS
    # torch's own: input is log q, target log p, sum of p (log p - log q).
    kl = F.kl_div(now, base, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(found.kl, kl)
    assert (found.kl > 0.1).all()


def test_kl_has_the_base_first():
    """KL(base || tuned) of a base that is certain of one token: its negative log-probability."""
    now, base = torch.tensor([[0.0, 0.0]]), torch.tensor([[30.0, 0.0]])
    found = score_positions(
        now, torch.eye(2), torch.tensor([0]), base_states=base, base_weight=torch.eye(2)
    )
    torch.testing.assert_close(found.kl, torch.tensor([2.0]).log())


def test_kl_of_equal_models_is_zero(targets):
    states, weight = make_head(0)
    found = score_positions(
        states, weight, targets, base_states=states.clone(), base_weight=weight.clone()
    )
    assert found.kl is not None and (found.kl == 0).all()


def test_without_a_base_there_is_no_kl(targets):
    assert score_positions(*make_head(0), targets).kl is None


def test_softmax_is_fp32_under_autocast(targets):
    """In bf16 a log-probability has two to three digits."""
    states, weight = make_head(0)
    with torch.autocast("cpu", torch.bfloat16):
        found = score_positions(states, weight, targets)
    logits = (states.bfloat16() @ weight.bfloat16().T).float()
    assert found.log_prob.dtype == torch.float32
    torch.testing.assert_close(found.log_prob, -F.cross_entropy(logits, targets, reduction="none"))


def test_logits_of_all_positions_never_exist(monkeypatch, largest_tensor):
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 30 * VOCABULARY)
    states, weight = (torch.randn(200, HIDDEN), torch.randn(VOCABULARY, HIDDEN))
    with largest_tensor:
        score_positions(
            states,
            weight,
            torch.zeros(200, dtype=torch.long),
            base_states=states + 1,
            base_weight=weight,
        )
    assert largest_tensor.numel == 30 * VOCABULARY


def test_documents_of_a_pack_are_scored_apart(make_pair, make_documents, make_pack):
    """A document's sums equal those of Hugging Face's model on it alone; one has no label."""
    ours, theirs = make_pair()
    base, their_base = make_pair(seed=9)
    documents = make_documents([9, 5, 2, 14])
    pack = make_pack(documents, prompt=2)
    # Empty documents, as in a pack of fixed shape, have scores of 0.
    pack["cu_seqlens"] = torch.cat([pack["cu_seqlens"], pack["cu_seqlens"][-1:]])
    found = score_pack(ours.eval(), **pack, base=BaseStates(lambda: nullcontext(base.eval())))
    assert found.num_tokens.tolist() == [7, 3, 0, 12, 0]
    for index, document in enumerate(documents):
        logits, base_logits = (
            model.eval()(document[None]).logits[0, 1:-1].double() for model in (theirs, their_base)
        )
        log_probs = logits.log_softmax(-1)
        label = document[2:]
        expected = log_probs.gather(1, label[:, None]).sum()
        torch.testing.assert_close(found.log_prob[index], expected, rtol=1e-5, atol=1e-5)
        assert found.num_correct[index] == (log_probs.argmax(-1) == label).sum()
        kl = F.kl_div(log_probs, base_logits.log_softmax(-1), reduction="sum", log_target=True)
        assert found.kl is not None
        torch.testing.assert_close(found.kl[index], kl, rtol=1e-5, atol=1e-5)


class Counted:
    """A base model that counts the packs that it computes."""

    def __init__(self, model):
        self.model, self.packs = model.eval(), 0
        self.compute = model.states_at_labels
        model.states_at_labels = self.states_at_labels

    def states_at_labels(self, **pack):
        self.packs += 1
        return self.compute(**pack)

    def __call__(self):
        return nullcontext(self.model)


@pytest.fixture
def packs(make_documents, make_pack):
    return [make_pack(make_documents([9, 5, 14], seed=seed), prompt=2) for seed in range(2)]


def test_kept_states_give_the_same_bits(make_pair, packs):
    """Later measurements compute the base model for no pack, and other packs are not mixed up."""
    (ours, _), (base, _) = make_pair(), make_pair(seed=9)
    counted = Counted(base)
    kept = BaseStates(counted)
    expected = [score_pack(ours.eval(), **pack, base=BaseStates(counted)) for pack in packs]
    counted.packs = 0
    for _ in range(3):
        for pack, once in zip(packs, expected, strict=True):
            found = score_pack(ours, **pack, base=kept)
            assert all(torch.equal(a, b) for a, b in zip(found, once, strict=True))
    assert counted.packs == 2
    assert kept.num_bytes == 2 * (7 + 3 + 12) * base.config.hidden_size * 4
    changed = {**packs[0], "labels": packs[0]["labels"].clone()}
    changed["labels"][0, 4] = -100
    score_pack(ours, **changed, base=kept)
    kept.forget()
    score_pack(ours, **packs[0], base=kept)
    assert counted.packs == 4, "other labels, and a base model that has changed"


def test_states_over_the_limit_are_computed_again(make_pair, packs):
    (ours, _), (base, _) = make_pair(), make_pair(seed=9)
    counted = Counted(base)
    kept = BaseStates(counted)
    kept.limit = 30 * base.config.hidden_size * 4
    first, again = ([score_pack(ours.eval(), **p, base=kept).kl for p in packs] for _ in range(2))
    assert counted.packs == 3 and kept.num_bytes <= kept.limit
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_base_measured_against_itself_is_computed_once(make_pair, packs):
    base, ours = (make_pair(seed=seed)[0].eval() for seed in (9, 0))
    counted = Counted(base)
    kept = BaseStates(counted)
    kept.itself = base
    itself = score_pack(base, **packs[0], base=kept)
    assert counted.packs == 1 and (itself.kl == 0).all()
    kept.itself = None
    found = score_pack(ours, **packs[0], base=kept).kl
    assert counted.packs == 1
    assert torch.equal(found, score_pack(ours, **packs[0], base=BaseStates(counted)).kl)
