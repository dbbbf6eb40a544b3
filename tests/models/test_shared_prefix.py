"""Scores of trees equal those of each document alone in transformers' Llama, in fp64."""

import random

import numpy as np
import pytest
import torch

from foundry_ext.evaluation.trees import common_prefix, lay_out, num_laid_out, plant
from foundry_ext.models import attention
from foundry_ext.models.shared_prefix import score_trees
from foundry_ext.packing.collator import Document
from tests.models.conftest import VOCABULARY


def document(ids, scored):
    mask = np.zeros(len(ids), dtype=bool)
    mask[scored] = True
    return Document(input_ids=np.asarray(ids), loss_mask=mask)


def random_tree(rng):
    """Return 1 to 5 documents; some end within the prefix, and some labels are within it."""
    prefix = [rng.randrange(VOCABULARY) for _ in range(rng.choice([1, 2, 7, 70]))]
    documents = []
    for _ in range(rng.randint(1, 5)):
        rest = [rng.randrange(VOCABULARY) for _ in range(rng.choice([1, 1, 3, 9, 66]))]
        ids = prefix + rest
        first = rng.randint(1, len(ids) - 1)
        documents.append(document(ids, slice(first, None)))
    return documents


@torch.no_grad()
def alone(theirs, documents):
    """Return each document's summed log-probability, computed by itself."""
    sums = []
    for one in documents:
        log_probs = theirs(torch.from_numpy(one.input_ids)[None]).logits[0].log_softmax(-1)
        places = np.flatnonzero(one.loss_mask)
        sums.append(sum(log_probs[place - 1, one.input_ids[place]].item() for place in places))
    return torch.tensor(sums, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(6))
def test_any_trees(make_pair, seed):
    ours, theirs = (model.double().eval() for model in make_pair())
    rng = random.Random(seed)
    trees = [random_tree(rng) for _ in range(rng.randint(1, 6))]
    pack = lay_out(trees)
    assert len(pack.input_ids) == sum(map(num_laid_out, trees)) == pack.trees[-1][-1]
    expected = alone(theirs, [one for tree in trees for one in tree])
    # The softmax is fp32 in every precision.
    torch.testing.assert_close(score_trees(ours, pack), expected, rtol=2e-6, atol=2e-6)


def _flash(q, k, v, cu_queries, max_queries, _dropout, keys):
    """Compute what a flash kernel documents of causal attention over more keys than queries."""
    cu_keys, max_keys = keys
    out = torch.empty_like(q)
    groups = q.shape[1] // k.shape[1]
    for index in range(len(cu_queries) - 1):
        rows, columns = (slice(*ends[index : index + 2].tolist()) for ends in (cu_queries, cu_keys))
        q_i, k_i, v_i = (
            x.transpose(0, 1)
            for x in (
                q[rows],
                k[columns].repeat_interleave(groups, 1),
                v[columns].repeat_interleave(groups, 1),
            )
        )
        num_queries, num_keys = q_i.shape[1], k_i.shape[1]
        assert 0 < num_queries <= max_queries and num_queries <= num_keys <= max_keys
        scores = q_i @ k_i.transpose(1, 2) * q.shape[-1] ** -0.5
        later = torch.ones(num_queries, num_keys, dtype=torch.bool).triu(num_keys - num_queries + 1)
        out[rows] = (scores.masked_fill(later, -torch.inf).softmax(-1) @ v_i).transpose(0, 1)
    return out


@pytest.mark.parametrize("backend", ["auto", "blockwise", "sdpa", "flex", "torch_varlen"])
def test_any_backend(make_pair, monkeypatch, backend):
    """The flash kernel is a reference of it here; tests/nullgpu and the gpu tests run its own."""
    if backend == "torch_varlen":
        monkeypatch.setattr(attention, "_torch_varlen", _flash)
        monkeypatch.setattr(attention, "_why_not", lambda *_, **__: "")
    ours, theirs = (model.eval() for model in make_pair())
    ours.attention_backend = backend
    rng = random.Random(11)
    trees = [random_tree(rng) for _ in range(4)]
    found = score_trees(ours, lay_out(trees))
    expected = alone(theirs, [one for tree in trees for one in tree])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_layout():
    """Two labels at the prefix's last position, one label inside the prefix, an empty branch."""
    tree = [document([5, 6, 7], [1, 2]), document([5, 6, 8, 9], [2, 3])]
    pack = lay_out([[document([3, 4], [1])], tree])
    assert pack.input_ids.tolist() == [3, 5, 6, 8]
    assert pack.position_ids.tolist() == [0, 0, 1, 2]
    assert pack.trees == [(0, 1), (1, 3, 3, 4)]
    assert pack.states.tolist() == [0, 1, 2, 2, 3]
    assert pack.targets.tolist() == [4, 6, 7, 8, 9]
    assert pack.documents.tolist() == [0, 1, 1, 2, 2]
    assert pack.keys.index.tolist() == [0, 1, 2, 1, 2, 3]
    assert pack.keys.cu_queries.tolist() == [0, 1, 3, 4]
    assert pack.keys.cu_keys.tolist() == [0, 1, 3, 6]


def test_what_is_shared():
    """Documents without a common beginning, or too long together, are laid out apart."""
    ids = [[5, 6, 7], [5, 6, 8, 9], [4, 6, 8], [5, 6, 8, 9, 9]]
    documents = [document(one, [1]) for one in ids]
    assert common_prefix([documents[1], documents[3]]) == 3
    assert plant([[0, 1], [2, 3]], documents, 9).trees == [[0, 1], [2], [3]]
    assert plant([[0, 1, 3]], documents, 5).trees == [[0, 1, 3]]
    assert plant([[0, 1, 3]], documents, 4).trees == [[0], [1], [3]]
    assert plant([[1, 3]], documents, 4).packs == [[0]], "four tokens are laid out"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("backend", "dtype"), [("torch_varlen", torch.bfloat16), ("flex", None), ("sdpa", None)]
)
def test_on_a_gpu(make_pair, tiny_config, backend, dtype):
    """Scores are the CPU's: in bf16 as exact as those of every document laid out alone."""
    ours, _ = make_pair(tiny_config(head_dim=16))
    ours.eval()
    rng = random.Random(11)
    trees = [random_tree(rng) for _ in range(4)]
    apart = lay_out([[one] for tree in trees for one in tree])
    exact = score_trees(ours, apart)
    ours.attention_backend = backend
    ours.cuda()
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype is not None):
        together, alone = (
            score_trees(ours, pack.to(ours.device)) for pack in (lay_out(trees), apart)
        )
    if dtype is None:
        torch.testing.assert_close(together, exact, rtol=1e-4, atol=1e-4)
    else:
        error, least = ((x - exact).abs().max() for x in (together, alone))
        assert error < 1.5 * least + 0.02 * exact.abs().max(), (error, least)
