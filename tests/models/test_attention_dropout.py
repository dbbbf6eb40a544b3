"""attention_dropout: right in expectation, only in training, repeatable, refused if unsupported."""

import pytest
import torch
import torch.nn.functional as F

from foundry_ext.models import attention
from foundry_ext.models.attention import resolve_backend, varlen_attention

P = 0.3
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
with_dropout = pytest.mark.parametrize(
    ("backend", "device"),
    [
        pytest.param("sdpa", "cpu", id="sdpa-cpu"),
        *(
            pytest.param(name, "cuda", marks=gpu, id=f"{name}-cuda")
            for name in ("sdpa", "torch_varlen", "flash_attn")
        ),
    ],
)


def make_inputs(lengths, device, *, heads=(4, 2), head_dim=16):
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = (
        torch.randn(sum(lengths), num, head_dim, generator=generator).to(device, dtype)
        for num in (heads[0], heads[1], heads[1])
    )
    cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device, torch.int32)
    return q, k, v, cu_seqlens


def need(backend):
    if backend == "flash_attn":
        pytest.importorskip("flash_attn")
    if backend == "torch_varlen" and attention._has_varlen_module():
        pytest.skip("from torch 2.10 on it has no dropout")


@with_dropout
def test_a_lone_token_keeps_its_value_scaled_or_nothing(backend, device):
    """Its attention weight is 1, so the output is 0 with probability p, otherwise v/(1 - p)."""
    need(backend)
    q, k, v, cu_seqlens = make_inputs([1] * 100, device, heads=(32, 32))
    torch.manual_seed(1)
    out = varlen_attention(q, k, v, cu_seqlens, 1, backend=backend, dropout_p=P)
    dropped = (out == 0).all(-1)
    expected = torch.where(dropped[..., None], 0, v.float() / (1 - P))
    torch.testing.assert_close(out.float(), expected, rtol=2**-7, atol=1e-6)
    share, error = dropped.float().mean().item(), (P * (1 - P) / dropped.numel()) ** 0.5
    assert abs(share - P) < 5 * error


@with_dropout
def test_the_expectation_is_attention_without_dropout(backend, device):
    need(backend)
    inputs = make_inputs([6, 1, 9], device)
    exact = varlen_attention(*inputs, 9, backend=backend).float()
    torch.manual_seed(2)
    draws = torch.stack(
        [varlen_attention(*inputs, 9, backend=backend, dropout_p=P).float() for _ in range(600)]
    )
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - exact).abs() <= 5 * error + 4e-3).all()
    assert (draws.std(0) > 0.05).float().mean() > 0.9


@with_dropout
def test_a_seed_repeats_it_forward_and_backward(backend, device):
    need(backend)
    q, k, v, cu_seqlens = make_inputs([6, 1, 9], device)

    def run(seed):
        torch.manual_seed(seed)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = varlen_attention(*leaves, cu_seqlens, 9, backend=backend, dropout_p=P)
        return out, *torch.autograd.grad(out.float().square().sum(), leaves)

    first, again, other = run(3), run(3), run(4)
    for a, b, c in zip(first, again, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0 if device == "cpu" else 1e-2)
        assert not torch.equal(a, c)


@pytest.mark.parametrize("backend", ["flex", "torch_varlen"])
def test_refused_where_the_kernel_has_none(backend, monkeypatch):
    monkeypatch.setattr(attention, "_has_varlen_module", lambda: True)
    attention._why_not.cache_clear()
    resolve_backend(backend, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=f"'{backend}' .* attention_dropout; use 'flash_attn'"):
        resolve_backend(backend, device="cuda", dtype=torch.bfloat16, dropout=True)
    attention._why_not.cache_clear()


def test_auto_takes_one_that_has_it(monkeypatch):
    monkeypatch.setattr(attention, "_has_varlen_module", lambda: True)
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: None)
    for cached in (attention._why_not, attention._best_backend):
        cached.cache_clear()
    settings = {"device": "cuda", "dtype": torch.bfloat16}
    assert resolve_backend("auto", **settings) == "torch_varlen"
    assert resolve_backend("auto", **settings, dropout=True) == "sdpa"
    for cached in (attention._why_not, attention._best_backend):
        cached.cache_clear()


# --- the model -----------------------------------------------------------------------------------


@pytest.fixture
def models(make_pair, tiny_config):
    """The same weights with dropout and without."""
    return [make_pair(tiny_config(attention_dropout=p))[0] for p in (P, 0.0)]


@pytest.fixture
def pack(make_documents, make_pack):
    return make_pack(make_documents([5, 1, 16, 3]))


def loss(model, pack, seed):
    torch.manual_seed(seed)
    return model(**pack).loss.item()


def test_active_in_training_alone(models, pack):
    dropping, plain = models
    assert loss(dropping.eval(), pack, 0) == loss(plain.eval(), pack, 0)
    losses = [loss(dropping.train(), pack, seed) for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert loss(plain.train(), pack, 0) not in losses


def test_recomputed_layers_drop_the_same(models, pack):
    """Activation checkpointing runs attention twice; the second must repeat the first."""
    dropping = models[0].train()
    gradients = []
    for recompute in (False, True):
        if recompute:
            dropping.gradient_checkpointing_enable({"use_reentrant": False})
        dropping.zero_grad()
        torch.manual_seed(0)
        dropping(**pack).loss.backward()
        gradients.append(dropping.model.layers[0].self_attn.q_proj.weight.grad.clone())
    assert torch.equal(*gradients)


@pytest.mark.parametrize("p", [1.0, -0.1])
def test_no_probability(p, make_pair, tiny_config):
    with pytest.raises(ValueError, match=f"attention_dropout={p} must be .* below 1"):
        make_pair(tiny_config(attention_dropout=p))
