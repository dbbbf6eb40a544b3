"""torch.compile in training: the same numbers, one graph for all layers and all packs."""

import functools
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from foundry_ext.models import attention, decoder, loss
from foundry_ext.models import compiled as compiled_code
from foundry_ext.models.compiled import compile_model, fuse_evaluation, graphs_compiled
from foundry_ext.models.decoder import LEAST_FUSED, PLAIN, Pieces, decoder_layer
from foundry_ext.models.smollm2 import SmolLM2ForCausalLM
from foundry_ext.packing.collator import Document, PackCollator

PACK_TOKENS, MAX_SEQ_LEN = 64, 24


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture
def without_code_generation(monkeypatch):
    """Traces and differentiates as usual, but runs the graph uncompiled: seconds less per test."""
    traced = functools.partial(torch.compile, backend="aot_eager")

    def compile_traced(function, *, mode="default", **options):
        return traced(function, **options)

    monkeypatch.setattr(torch, "compile", compile_traced)


def packs(config, *lengths, fixed_shape=True):
    collate = PackCollator(
        max_seq_len=MAX_SEQ_LEN, pack_tokens=PACK_TOKENS, fixed_shape=fixed_shape
    )
    rng = np.random.default_rng(0)
    for one in lengths:
        documents = [
            Document(rng.integers(1, config.vocab_size, n), np.ones(n, dtype=bool)) for n in one
        ]
        pack = collate(documents)
        keys = ("input_ids", "position_ids", "labels", "cu_seqlens", "max_seqlen")
        yield {**{key: pack[key] for key in keys}, "num_loss_tokens": pack["num_loss_tokens"]}


def train_step(model, pack):
    model.zero_grad()
    out = model(**pack).loss
    out.backward()
    return out.item(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


SHAPES = ([20, 24, 10], [5], [24, 24, 16], [], [1, 2, 3, 4, 5, 6])


@pytest.mark.parametrize("scope", ["layers", "model"])
def test_equals_eager_without_a_recompilation(scope, tiny_config, without_code_generation):
    config = tiny_config(num_hidden_layers=3)
    torch.manual_seed(0)
    eager = SmolLM2ForCausalLM(config).train()
    compiled = SmolLM2ForCausalLM(config).train()
    compiled.load_state_dict(eager.state_dict())
    compile_model(compiled, scope=scope)
    assert list(compiled.state_dict()) == list(eager.state_dict())
    for number, pack in enumerate(packs(config, *SHAPES)):
        (our_loss, ours), (exact_loss, exact) = train_step(compiled, pack), train_step(eager, pack)
        assert our_loss == pytest.approx(exact_loss, rel=1e-6)
        for name, gradient in exact.items():
            torch.testing.assert_close(ours[name], gradient, atol=1e-6, rtol=1e-4, msg=name)
        assert graphs_compiled() == 1, f"pack {number} was compiled anew"


def test_the_compiler_does_run(tiny_config, monkeypatch):
    """Without this the tests above might compare eager with eager."""
    config = tiny_config()
    model = SmolLM2ForCausalLM(config).train()
    compile_model(model, scope="layers")
    called = []
    inner = model.model.layers[0].compiled
    for layer in model.model.layers:
        layer.compiled = lambda *arguments: called.append(1) or arguments[1]
    (pack,) = packs(config, [5])
    model(**pack)
    assert len(called) == config.num_hidden_layers
    assert inner is not None


def test_evaluation_is_not_compiled(tiny_config, without_code_generation):
    config = tiny_config()
    model = SmolLM2ForCausalLM(config).eval()
    compile_model(model, scope="layers")
    with torch.no_grad():
        for pack in packs(config, [5], [7, 8], fixed_shape=False):
            model(**pack)
    assert graphs_compiled() == 0


def check_fused(config):
    """Compare a layer with fused pieces, under autocast and without, on packs of several sizes."""
    compiled_code._fused_pieces.cache_clear()
    torch.manual_seed(0)
    layer = SmolLM2ForCausalLM(config).eval().model.layers[0]
    counts = []
    for bf16 in (False, True):
        for size in (12, 40, 23):
            x = torch.randn(size, config.hidden_size)
            cos, sin = torch.randn(2, size, config.head_dim // 2)

            def attend(q, k, v):
                assert q.dtype == k.dtype == v.dtype
                return q * v.repeat_interleave(q.shape[1] // v.shape[1], 1)

            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                plain = decoder_layer(layer, x, cos, sin, attend)
                fused = decoder_layer(layer, x, cos, sin, attend, compiled_code._fused_pieces())
            tolerance = (2e-2 if bf16 else 1e-5) * plain.abs().max().item()
            torch.testing.assert_close(fused, plain, atol=tolerance, rtol=0)
            counts.append(graphs_compiled())
    # A graph each for norm, rotary and SwiGLU, in fp32 and under autocast.
    assert counts == [3, 3, 3, 6, 6, 6]


def test_fused_pieces_equal_plain_ones(tiny_config, without_code_generation):
    check_fused(tiny_config())


@pytest.mark.more
def test_fused_pieces_by_generated_code(tiny_config):
    check_fused(tiny_config())


def test_the_fused_norm_casts_for_linear_layers():
    norm = compiled_code._fused_pieces().rms_norm
    x, weight = torch.randn(12, 8), torch.ones(8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert norm(x, weight, 1e-5).dtype == torch.bfloat16
    assert norm(x, weight, 1e-5).dtype == torch.float32


def test_only_a_compiled_model_is_fused(tiny_config):
    model = SmolLM2ForCausalLM(tiny_config())
    for change, fused in (
        (lambda: compile_model(model, scope="layers"), True),
        (lambda: compile_model(model, scope="none"), False),
        (lambda: fuse_evaluation(model), True),
    ):
        change()
        assert (model.model.evaluation_pieces is not PLAIN) == fused


def test_every_layer_uses_the_pieces(tiny_config, monkeypatch):
    config = tiny_config(num_hidden_layers=3)
    model = SmolLM2ForCausalLM(config).eval()
    calls = []

    def counted(piece):
        return lambda *given: calls.append(piece.__name__) or piece(*given)

    model.model.evaluation_pieces = Pieces(*map(counted, PLAIN))
    (pack,) = packs(config, [5, 7])
    with torch.no_grad():
        model(**pack)
        assert not calls, "on a CPU"
        monkeypatch.setattr(decoder, "can_fuse", lambda hidden: True)
        model(**pack)
    assert Counter(calls) == {"rms_norm": 6, "rotate": 3, "swiglu": 3}


@pytest.mark.parametrize(
    ("shape", "is_cuda", "grad", "expected"),
    [
        ((LEAST_FUSED, 8), True, False, True),
        ((LEAST_FUSED, 8), True, True, False),
        ((LEAST_FUSED, 8), False, False, False),
        ((4, 8), True, False, False),
        ((LEAST_FUSED, 1, 8), True, False, False),
    ],
    ids=["pack", "gradients", "CPU", "generation", "cache"],
)
def test_passes_that_are_fused(shape, is_cuda, grad, expected):
    hidden: Any = SimpleNamespace(shape=shape, ndim=len(shape), is_cuda=is_cuda)
    with torch.set_grad_enabled(grad):
        assert decoder.can_fuse(hidden) == expected


def test_frozen_base_with_adapters(tiny_config, without_code_generation):
    """The first layer's input needs no gradient, all others' do: two graphs, and no more."""
    peft = pytest.importorskip("peft")
    config = tiny_config(num_hidden_layers=4)
    settings = peft.LoraConfig(
        r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    torch.manual_seed(0)
    eager = SmolLM2ForCausalLM(config)
    compiled = SmolLM2ForCausalLM(config)
    compiled.load_state_dict(eager.state_dict())
    eager, compiled = (peft.get_peft_model(model, settings).train() for model in (eager, compiled))
    compiled.load_state_dict(eager.state_dict())
    compile_model(compiled.get_base_model(), scope="layers")
    for pack in packs(config, *SHAPES):
        (our_loss, ours), (exact_loss, exact) = train_step(compiled, pack), train_step(eager, pack)
        assert our_loss == pytest.approx(exact_loss, rel=1e-6)
        for name, gradient in exact.items():
            torch.testing.assert_close(ours[name], gradient, atol=1e-6, rtol=1e-4, msg=name)
        assert graphs_compiled() == 2


def test_activation_checkpointing(tiny_config, without_code_generation):
    config = tiny_config()
    torch.manual_seed(0)
    eager = SmolLM2ForCausalLM(config).train()
    compiled = SmolLM2ForCausalLM(config).train()
    compiled.load_state_dict(eager.state_dict())
    compile_model(compiled, scope="layers")
    compiled.gradient_checkpointing_enable({"use_reentrant": False})
    for pack in packs(config, [20, 24], [9]):
        (our_loss, ours), (exact_loss, exact) = train_step(compiled, pack), train_step(eager, pack)
        assert our_loss == pytest.approx(exact_loss, rel=1e-6)
        for name, gradient in exact.items():
            torch.testing.assert_close(ours[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_dynamic_takes_packs_of_every_size(tiny_config, without_code_generation):
    """After a few graphs, which torch specialises on sizes that happen to be equal."""
    config = tiny_config(num_hidden_layers=1)
    model = SmolLM2ForCausalLM(config).train()
    compile_model(model, scope="layers", dynamic=True)
    lengths = [[20, 24, 10], [5], [7, 7, 7, 7, 7, 7, 7], [11, 2], [24, 24, 6, 6], [9, 8, 7, 6, 5]]
    counts = []
    for pack in packs(config, *lengths, fixed_shape=False):
        train_step(model, pack)
        counts.append(graphs_compiled())
    assert counts[-1] == counts[3]


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_backends_that_are_not_compiled(backend, tiny_config, without_code_generation):
    """The parts before and after attention compile; other packs add no graph."""
    config = tiny_config()
    torch.manual_seed(0)
    model = SmolLM2ForCausalLM(config).train()
    model.attention_backend = backend
    compile_model(model, scope="layers")
    graphs = set()
    for pack in packs(config, *SHAPES[:3]):
        with torch.set_grad_enabled(backend == "sdpa"):  # flex has no backward pass on a CPU
            model(**pack)
        graphs.add(graphs_compiled())
    assert len(graphs) == 1


def test_torch_s_kernel_is_one_operator(tiny_config):
    """The same without a GPU: the meta device checks arguments and shapes, forward and backward,
    and that a layer compiles as one graph."""
    config = tiny_config()
    with torch.device("meta"):
        layer = SmolLM2ForCausalLM(config).model.layers[0].to(torch.bfloat16)
        x = torch.empty(12, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        cos = sin = torch.empty(12, config.head_dim // 2, dtype=torch.bfloat16)
        cu_seqlens = torch.empty(4, dtype=torch.int32)

    def attend(q, k, v):
        return attention._KERNELS["torch_varlen"](q, k, v, cu_seqlens, 8, 0.0)

    compiled = torch.compile(decoder_layer, backend="aot_eager", fullgraph=True)
    out = compiled(layer, x, cos, sin, attend)
    assert out.shape == x.shape and out.dtype == x.dtype
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert graphs_compiled() == 1


@pytest.mark.parametrize(("scope", "mode"), [("all", "default"), ("layers", "fast")])
def test_unknown(scope, mode, tiny_config):
    with pytest.raises(ValueError, match=r"compile.*is unknown; choose one of"):
        compile_model(SmolLM2ForCausalLM(tiny_config()), scope=scope, mode=mode)


@pytest.mark.more
def test_generated_code(tiny_config):
    """The real compiler, losses of 20 steps: within fp32 rounding of eager."""
    config = tiny_config()
    models = []
    for scope in ("none", "layers"):
        torch.manual_seed(0)
        model = SmolLM2ForCausalLM(config).train()
        model.loss_implementation = "compiled" if scope == "layers" else "chunked"
        compile_model(model, scope=scope)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for pack in packs(config, *SHAPES * 4):
            losses.append(train_step(model, pack)[0])
            optimizer.step()
        models.append(losses)
    assert models[0] == pytest.approx(models[1], rel=2e-5)


@pytest.mark.more
def test_generated_code_under_autocast(tiny_config):
    """The residual stream is fp32 and what is added to it bf16, which Inductor's addmm refuses."""
    (pack,) = packs(tiny_config(), SHAPES[0])
    losses = []
    for scope in ("none", "layers"):
        torch.manual_seed(0)
        model = SmolLM2ForCausalLM(tiny_config(num_hidden_layers=1)).train()
        compile_model(model, scope=scope)
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(train_step(model, pack)[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.more
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_loss(dtype, monkeypatch):
    """Chunks of three sizes, the last of one row; one graph, or two for the first size."""
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 50 * 4)
    loss._compiled_loss_and_gradient.cache_clear()
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(50, 8, dtype=dtype))
    for rows in (12, 9, 7, 5, 0):
        hidden = torch.randn(rows, 8, dtype=dtype, requires_grad=True)
        target = torch.randint(50, (rows,))
        got = {}
        for name in ("chunked", "compiled"):
            weight.grad = hidden.grad = None
            value = loss.linear_cross_entropy(hidden, weight, target, implementation=name)
            value.backward()
            got[name] = value, hidden.grad, weight.grad
        for ours, exact in zip(got["compiled"], got["chunked"], strict=True):
            torch.testing.assert_close(ours, exact)
    assert graphs_compiled() <= 2
