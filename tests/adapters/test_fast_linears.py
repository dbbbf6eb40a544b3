"""The fast forward passes of LoRA and DoRA against peft's own.

`stock` is peft's model, `fast` a copy of it with `use_fast_linears`.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig

from foundry_ext.adapters.dora import FastDoraLinear, row_norms
from foundry_ext.adapters.fast import use_fast_linears
from foundry_ext.adapters.lora import FastLoraLinear
from foundry_ext.models.decoder import SmolLM2DecoderLayer
from foundry_ext.models.rope import rotary_cos_sin
from foundry_ext.models.smollm2 import SmolLM2ForCausalLM
from tests.flops import counter

FAST = {False: FastLoraLinear, True: FastDoraLinear}
I, H, O, R, T = 24, 40, 16, 4, 21  # noqa: E741 - as in foundry_ext/adapters/dora.py


class Net(nn.Module):
    def __init__(self, bias=False):
        super().__init__()
        self.up, self.down = nn.Linear(I, H, bias=bias), nn.Linear(H, O, bias=bias)

    def forward(self, x):
        return self.down(F.silu(self.up(x)))


def adapted(net, seed=0, **settings):
    torch.manual_seed(seed)
    config = {"r": R, "lora_alpha": 6, "use_dora": True, "target_modules": "all-linear", **settings}
    model = get_peft_model(net, LoraConfig(**config))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:  # an adapter without effect would hide every mistake in it
                p.mul_(1.1).add_(0.1 * torch.randn_like(p))
    return model


def pair(bias=False, dtype=torch.float32, **settings):
    torch.manual_seed(1)
    stock = adapted(Net(bias), **settings).to(dtype)
    fast = copy.deepcopy(stock)
    use_fast_linears(fast)
    return stock, fast


def run(model, x, autocast=False):
    """Return the output and every gradient by name, including that of x."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    (y.double().sin() * torch.linspace(0.5, 1.5, y.shape[-1])).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **grads}


def assert_close(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys() and len(ours) > 3
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], **tolerance, msg=lambda m: f"{name}: {m}")  # noqa: B023


def data(dtype=torch.float32, seed=2):
    return torch.randn(3, T // 3, I, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Forbidden(Exception):
    pass


@pytest.fixture(params=[False, True], ids=["lora", "dora"])
def use_dora(request):
    return request.param


@pytest.fixture
def only_fast(monkeypatch):
    """Make peft's forward pass of a linear fail during the test."""

    def fail(*_args, **_kwargs):
        raise Forbidden

    monkeypatch.setattr(PeftLinear, "forward", fail)


# --- the same numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float32, {"rtol": 1e-5, "atol": 2e-6}),
        (torch.float64, {"rtol": 1e-11, "atol": 1e-12}),
    ],
)
def test_outputs_and_gradients(dtype, tolerance, rslora, use_dora):
    stock, fast = pair(dtype=dtype, use_rslora=rslora, use_dora=use_dora)
    assert [type(m) for m in fast.modules()].count(FAST[use_dora]) == 2
    assert_close(run(fast, data(dtype)), run(stock, data(dtype)), **tolerance)


def test_autocast_is_as_exact_as_in_peft(use_dora):
    """Both run in bf16 against fp64: peft rounds W x and B A x, ours rounds their sum."""
    stock, fast = pair(use_dora=use_dora)
    double = copy.deepcopy(stock).double()
    errors: dict[str, list] = {}
    for seed in range(8):
        x = data(seed=seed)
        exact, ours, theirs = run(double, x.double()), run(fast, x, True), run(stock, x, True)
        assert ours["y"].dtype == theirs["y"].dtype == torch.bfloat16
        for name, value in exact.items():
            assert ours[name].dtype == theirs[name].dtype
            pair_of_errors = [(x[name].double() - value).square().sum() for x in (ours, theirs)]
            errors.setdefault(name, []).append(torch.stack(pair_of_errors))
    for name, found in errors.items():
        mine, allowed = torch.stack(found).sum(0).sqrt()
        assert mine <= 1.1 * allowed, name


def test_fifty_steps(use_dora):
    stock, fast = pair(use_dora=use_dora)
    losses = []
    for model in (stock, fast):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.0)
        for step in range(50):
            optimizer.zero_grad()
            loss = (model(data(seed=step)) - 1).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    ours, theirs = losses[50:], losses[:50]
    assert ours == pytest.approx(theirs, rel=2e-5)
    assert theirs[-1] < 0.9 * theirs[0]


def test_a_magnitude_of_zero_gives_finite_gradients():
    stock, fast = pair()
    for model in (stock, fast):
        with torch.no_grad():
            model.base_model.model.up.lora_magnitude_vector["default"].weight[3] = 0
    ours, theirs = run(fast, data()), run(stock, data())
    name = next(name for name in ours if "up.lora_magnitude" in name)
    assert ours[name][3] == 0
    theirs[name][3] = 0
    assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("left", [1.0, 0.1, 0.01])
def test_row_norms_against_fp64(dtype, left):
    """The adapter cancels all but `left` of each row: s B A = -(1 - left) W.

    The error of n^2 is that of |W|^2, so n is off by that rounding over left^2.
    """
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(R, 576, generator=generator)
    B = torch.randn(96, R, generator=generator)
    weight = (B @ A).to(dtype)
    exact = (weight.double() + 0.5 * (-2 * (1 - left) * B.double()) @ A.double()).norm(dim=1)
    found = row_norms(weight, A, -2 * (1 - left) * B, 0.5)
    assert found.dtype == torch.float32
    assert ((found - exact).abs() / exact).max() < 1e-6 / left**2


# --- operations ----------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def flops(model, x):
    """Return the multiply-adds of a forward and a backward pass."""
    with counter() as forward:
        y = model(x)
    with counter() as backward:
        y.sum().backward()
    return forward.get_total_flops() // 2, backward.get_total_flops() // 2


def test_products_counted(only_fast):
    linear = pair()[1].base_model.model.up
    forward, backward = flops(linear, data().requires_grad_())
    norms = H * I * R + R * I * R + H * R * R
    assert forward == T * H * I + T * R * (I + H) + norms
    assert backward == T * H * I + 2 * T * R * (I + H)  # one product with W, not two
    assert flops(linear, data())[1] == T * R * (I + 2 * H)  # and none if x needs no gradient


def test_products_of_lora_counted(only_fast):
    linear = pair(use_dora=False)[1].base_model.model.up
    forward, backward = flops(linear, data().requires_grad_())
    assert forward == T * H * I + T * R * (I + H)
    assert backward == T * H * I + 2 * T * R * (I + H)
    assert flops(linear, data())[1] == T * R * (I + 2 * H)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_passes_of_lora(autocast):
    """LoRA makes no pass over [T, O] but its products, and keeps no copy of W."""
    linear, x = pair(use_dora=False)[1].base_model.model.up, data()
    kept = []
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        Operations() as operations,
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        linear(x)
    casts = 4 if autocast else 0  # of x, W, A and B
    assert operations.names.count("_to_copy") == casts
    assert not {"mul", "add"} & set(operations.names)
    as_large = {t.data_ptr() for t in kept if t.numel() == H * I}
    assert as_large == {linear.base_layer.weight.data_ptr()}


def test_no_unit_matrix():
    stock, fast = pair()
    for model, expected in ((stock, True), (fast, False)):
        with Operations() as operations:
            model(data())
        assert ("eye" in operations.names) == expected


def test_lora_multiplies_with_no_frozen_gradient():
    """In a LoRA step's backward pass each frozen linear has one product, the embedding none, and
    the head only the one for the states. Dropout 0 is the identity."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = adapted(SmolLM2ForCausalLM(config), use_dora=False, target_modules=targets)
    batch = {"input_ids": torch.arange(10)[None], "position_ids": torch.arange(10)[None]}
    batch |= {"cu_seqlens": torch.tensor([0, 10], dtype=torch.int32), "max_seqlen": 10}
    linears = [m for m in model.modules() if isinstance(m, PeftLinear)]
    assert all(type(m.lora_dropout["default"]) is nn.Identity for m in linears)
    products = 0
    with counter() as counted:
        model(**batch, labels=torch.arange(10)[None]).loss.backward()
    for m in linears:
        size, ends = m.base_layer.weight.numel(), sum(m.base_layer.weight.shape)
        first = any(
            m is getattr(model.base_model.model.model.layers[0].self_attn, n) for n in targets[:3]
        )
        back_to_x = 0 if first else size + R * m.in_features
        products += size + R * ends  # forward
        products += back_to_x + R * ends + R * m.out_features
    counts = counted.get_flop_counts()["Global"]
    matrix = (
        sum(n for op, n in counts.items() if str(op) in ("aten.mm", "aten.addmm", "aten.addmm_"))
        // 2
    )
    head = 2 * 9 * 32 * 50  # 9 labels, forward and back to the states
    assert matrix == 10 * products + head


# --- cases left to peft's own pass ----------------------------------------------------------------


def two_adapters(model, use_dora):
    model.add_adapter("second", LoraConfig(r=2, use_dora=use_dora, target_modules=["up", "down"]))
    model.base_model.set_adapter(["default", "second"])


def merged(model, _use_dora):
    model.merge_adapter()


def trainable_base(model, _use_dora):
    for m in model.modules():
        if isinstance(m, PeftLinear):
            m.base_layer.weight.requires_grad_()


OTHERS = {
    "two adapters": ({}, two_adapters),
    "merged": ({}, merged),
    "trainable base": ({}, trainable_base),
    "bias": ({"bias": True}, None),
    "bf16 model": ({"dtype": torch.bfloat16}, None),
}


@pytest.mark.parametrize("other", OTHERS)
def test_falls_back(other, monkeypatch, use_dora):
    settings, change = OTHERS[other]
    stock, fast = pair(**settings, use_dora=use_dora)
    for model in (stock, fast):
        torch.manual_seed(4)
        if change:
            change(model, use_dora)
    dtype = settings.get("dtype", torch.float32)
    if other == "bf16 model":
        for p in (*stock.parameters(), *fast.parameters()):
            if p.requires_grad:
                p.data = p.data.float()
    ours, theirs = (model(data(dtype)) for model in (fast, stock))
    assert torch.equal(ours, theirs)
    monkeypatch.setattr(PeftLinear, "forward", lambda *_: (_ for _ in ()).throw(Forbidden))
    with pytest.raises(Forbidden):
        fast(data(dtype))


def test_dropout_is_pefts_in_training_and_off_in_evaluation(only_fast, use_dora):
    _, fast = pair(lora_dropout=0.3, use_dora=use_dora)
    with pytest.raises(Forbidden):
        fast.train()(data())
    fast.eval()(data())


def test_dropout_has_the_same_numbers(use_dora):
    stock, fast = pair(lora_dropout=0.3, use_dora=use_dora)
    results = []
    for model in (stock, fast):
        torch.manual_seed(3)
        results.append(run(model.train(), data()))
    assert_close(*results, rtol=0, atol=0)
    assert_close(run(fast.eval(), data()), run(stock.eval(), data()), rtol=1e-5, atol=2e-6)


def test_adapter_off(use_dora):
    stock, fast = pair(use_dora=use_dora)
    with stock.disable_adapter(), fast.disable_adapter():
        ours, theirs = fast(data()), stock(data())
    assert torch.equal(ours, theirs)
    assert not torch.equal(fast(data()), ours)


def test_a_second_call_after_a_second_adapter_keeps_the_class(use_dora):
    _, fast = pair(use_dora=use_dora)
    two_adapters(fast, use_dora)
    use_fast_linears(fast)
    assert [type(m) for m in fast.modules()].count(FAST[use_dora]) == 2


# --- merging, saving, loading --------------------------------------------------------------------


def test_names_and_merging_are_pefts(use_dora):
    stock, fast = pair(use_dora=use_dora)
    assert stock.state_dict().keys() == fast.state_dict().keys()
    before = fast(data())
    for model in (stock, fast):
        model.merge_adapter()
    torch.testing.assert_close(fast(data()), before, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(fast.parameters(), stock.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    fast.unmerge_adapter()
    torch.testing.assert_close(fast(data()), before, rtol=1e-5, atol=1e-5)
    whole = fast.merge_and_unload()
    assert type(whole.up) is nn.Linear
    torch.testing.assert_close(whole(data()), before, rtol=1e-5, atol=1e-5)


def test_nothing_is_kept_of_earlier_weights(use_dora):
    """Norms, for example: after loading, or after an in-place change hidden from autograd."""
    stock, fast = pair(use_dora=use_dora)
    fast(data())
    changed = {name: value * 1.5 + 0.01 for name, value in stock.state_dict().items()}
    for model in (stock, fast):
        model.load_state_dict(changed)
    assert_close(run(fast, data()), run(stock, data()), rtol=1e-5, atol=1e-5)
    for model in (stock, fast):
        model.base_model.model.up.base_layer.weight.data *= 0.5
    assert_close(run(fast, data()), run(stock, data()), rtol=1e-5, atol=1e-5)


# --- compiled, recomputed, sharded ---------------------------------------------------------------


def make_layer(use_dora):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    layer = SmolLM2DecoderLayer(config)
    model = adapted(layer, use_dora=use_dora)
    use_fast_linears(model)
    position_ids = torch.arange(10)
    cos, sin = rotary_cos_sin(position_ids, head_dim=8, theta=1e4, dtype=torch.float32)

    def attend(q, k, v):
        q, k, v = (heads.transpose(0, 1) for heads in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(
            0, 1
        )

    return model.base_model.model, (cos, sin, attend)


@pytest.mark.parametrize(
    ("backend", "autocast"),
    [
        pytest.param("aot_eager", False, id="aot_eager-fp32"),
        pytest.param("aot_eager", True, id="aot_eager-bf16"),
        pytest.param("inductor", False, id="inductor-fp32", marks=pytest.mark.slow),
        pytest.param("inductor", True, id="inductor-bf16", marks=pytest.mark.more),
    ],
)
def test_a_layer_compiles_whole(backend, autocast, only_fast, use_dora):
    layer, rest = make_layer(use_dora)
    x = torch.randn(10, 32, generator=torch.Generator().manual_seed(1))
    expected = run(bound(layer, rest), x, autocast)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    found = run(bound(compiled, rest), x, autocast)
    found = {name.replace("_orig_mod.", ""): value for name, value in found.items()}
    if not autocast:
        assert_close(found, expected, rtol=1e-5, atol=2e-6)
    for name, value in expected.items():  # bf16: the compiler rounds less often
        assert (found[name] - value).norm() <= 2e-2 * value.norm(), name


def bound(layer, rest):
    class Bound(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x, *rest)

    return Bound()


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_recomputed_in_the_backward_pass(autocast, only_fast, use_dora):
    _, fast = pair(use_dora=use_dora)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = fast

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    again = {n.removeprefix("inner."): v for n, v in run(Checkpointed(), data(), autocast).items()}
    assert_close(again, run(fast, data(), autocast), rtol=0, atol=0)


def test_sharded_weights(mesh, monkeypatch, use_dora):
    """With FSDP2 on one rank, an adapter gathered with its layer uses the fast pass. Wrapped alone,
    as llm-foundry does, it uses peft's, which gathers it."""
    expected = run(pair(use_dora=use_dora)[0], data())
    calls = []
    forward = PeftLinear.forward
    monkeypatch.setattr(PeftLinear, "forward", lambda *a: calls.append(1) or forward(*a))
    for alone in (False, True):
        fast = pair(use_dora=use_dora)[1]
        for module in fast.modules():
            if alone and isinstance(module, FAST[use_dora]):
                for part in (module.lora_A, module.lora_B, module.lora_magnitude_vector):
                    if "default" in part:
                        fully_shard(part["default"], mesh=mesh)
        fully_shard(fast, mesh=mesh)
        calls.clear()
        found = run(fast, data())
        assert bool(calls) == alone
        found = {n: v.full_tensor() if isinstance(v, DTensor) else v for n, v in found.items()}
        assert_close(found, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.gpu
def test_on_a_gpu(use_dora):
    stock, fast = (model.cuda() for model in pair(use_dora=use_dora))
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    assert_close(run_gpu(fast, data()), run_gpu(stock, data()), **tolerance)


def run_gpu(model, x):
    model.zero_grad()
    x = x.cuda().requires_grad_()
    model(x).square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"x": x.grad, **grads}
