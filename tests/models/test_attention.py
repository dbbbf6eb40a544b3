"""Every attention backend against a dense masked softmax in fp32, written out here."""

import itertools
import logging
import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from foundry_ext.models import attention, flex, torch_cpu
from foundry_ext.models.attention import BACKENDS, resolve_backend, varlen_attention

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CPU_BACKENDS = [
    pytest.param(backend, "cpu", id=f"{backend}-cpu")
    for backend in ("sdpa", "blockwise", "torch_cpu", "flex")
]
GPU_BACKENDS = [
    pytest.param(backend, "cuda", marks=gpu, id=f"{backend}-cuda")
    for backend in BACKENDS[1:]
    if backend not in ("blockwise", "torch_cpu")
]
every_backend = pytest.mark.parametrize(("backend", "device"), CPU_BACKENDS + GPU_BACKENDS)

HEADS = [(9, 3), (15, 5), (32, 32)]  # query and key/value heads of 135M, 360M and 1.7B
LENGTHS = [
    [1],
    [5],
    [3, 1, 4],
    [1, 1, 1],
    [7, 0, 0, 5],
    [0, 4, 2, 0, 0, 0],  # a fixed shape repeats T at the end of cu_seqlens
    [64, 64, 64],  # every document as long as max_seqlen
    [130, 1, 129],  # across the blocks of 128 that flex works in
]


def make_inputs(lengths, heads, *, device="cpu", dtype=torch.float32, head_dim=16, seed=0):
    """q [T, H, N], k and v [T, K, N], cu_seqlens [D+1]."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(sum(lengths), num, head_dim, generator=generator).to(device, dtype)
        for num in (heads[0], heads[1], heads[1])
    )
    cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device, torch.int32)
    return q, k, v, cu_seqlens


def dense_attention(q, k, v, cu_seqlens):
    """The definition: [H, T, T] scores, masked, in the inputs' dtype."""
    num_tokens, num_heads, head_dim = q.shape
    lengths = cu_seqlens.diff().long()
    document = torch.arange(len(lengths), device=q.device).repeat_interleave(lengths)
    token = torch.arange(num_tokens, device=q.device)
    visible = (document[:, None] == document) & (token[:, None] >= token)
    k, v = (x[:, torch.arange(num_heads) // (num_heads // x.shape[1])] for x in (k, v))
    scores = torch.einsum("qhn,khn->hqk", q, k) * head_dim**-0.5
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khn->qhn", weights, v)


def skip_unless_installed(backend):
    if backend == "flash_attn":
        pytest.importorskip("flash_attn")


def assert_as_exact(ours, plain, exact, *, bf16_slack=2**-8):
    """Check the error: within fp32 rounding, or in bf16 within three times that of plain attention.

    FlashAttention's own tests use nearly the same bound. The slack is needed because plain
    attention has no error at all in a document of one token.
    """
    error = (ours.float() - exact).abs().max().item()
    scale = max(1.0, exact.abs().max().item())
    if ours.dtype == torch.float32:
        assert error <= 2e-6 * scale
    else:
        assert error <= 3 * (plain.float() - exact).abs().max().item() + bf16_slack * scale


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["sdpa", "blockwise", "torch_cpu", "flex"])
def test_forward(backend, dtype, heads, lengths):
    check_forward(backend, "cpu", dtype, heads, lengths)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize(("backend", "device"), GPU_BACKENDS)
def test_forward_on_a_gpu(backend, device, heads, lengths):
    check_forward(backend, device, torch.bfloat16, heads, lengths)


def check_forward(backend, device, dtype, heads, lengths):
    skip_unless_installed(backend)
    inputs = make_inputs(lengths, heads, device=device, dtype=dtype)
    with torch.no_grad():
        ours = varlen_attention(*inputs, max(lengths), backend=backend)
        plain = dense_attention(*inputs)
        exact = dense_attention(*(x.float() for x in inputs[:3]), inputs[3])
    assert ours.dtype == dtype
    assert ours.shape == inputs[0].shape
    assert_as_exact(ours, plain, exact)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize(("backend", "device"), [*CPU_BACKENDS[:3], *GPU_BACKENDS])
def test_gradients(backend, device, heads, lengths):
    """Skip flex on a CPU, where later versions of torch have no backward pass for it."""
    skip_unless_installed(backend)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    *qkv, cu_seqlens = make_inputs(lengths, heads, device=device, dtype=dtype)
    grad = make_inputs(lengths, heads, device=device, dtype=dtype, seed=1)[0]

    def gradients(attend, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in qkv]
        return torch.autograd.grad(attend(*leaves), leaves, grad.to(dtype))

    ours = gradients(
        lambda *leaves: varlen_attention(*leaves, cu_seqlens, max(lengths), backend=backend), dtype
    )
    plain = gradients(lambda *leaves: dense_attention(*leaves, cu_seqlens), dtype)
    exact = gradients(lambda *leaves: dense_attention(*leaves, cu_seqlens), torch.float32)
    for one in zip(ours, plain, exact, strict=True):
        assert_as_exact(*one, bf16_slack=2**-4)


def test_the_fused_kernel_gets_tensors_that_it_can_read():
    """It ignores the last stride, which is 0 in the gradient of a sum and more in a transpose."""
    *qkv, cu_seqlens = make_inputs([5, 0, 9], (9, 3))
    found = []
    for backend in ("torch_cpu", "sdpa"):
        leaves = [x.transpose(1, 2).contiguous().requires_grad_() for x in qkv]
        views = (x.transpose(1, 2) for x in leaves)
        out = varlen_attention(*views, cu_seqlens, 9, backend=backend)
        found.append([out.detach(), *torch.autograd.grad(out.sum(), leaves)])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain)


def test_short_and_long_documents_in_bf16():
    """The backward pass of torch_cpu changes its dtype with the length."""
    longer = torch_cpu._FP32_BELOW + 1
    *qkv, cu_seqlens = make_inputs([40, longer], (6, 2), dtype=torch.bfloat16)
    grad = make_inputs([40, longer], (6, 2), dtype=torch.bfloat16, seed=1)[0]

    def gradients(backend, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in qkv]
        out = varlen_attention(*leaves, cu_seqlens, longer, backend=backend)
        return torch.autograd.grad(out, leaves, grad.to(dtype))

    ours, plain = (gradients(name, torch.bfloat16) for name in ("torch_cpu", "sdpa"))
    for one in zip(ours, plain, gradients("sdpa", torch.float32), strict=True):
        assert one[0].dtype == torch.bfloat16
        assert_as_exact(*one, bf16_slack=2**-4)


@every_backend
def test_documents_do_not_see_each_other(backend, device):
    """Trap 3: whatever one document holds, the outputs of the others keep every bit."""
    skip_unless_installed(backend)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    lengths = [130, 1, 7, 0, 64]
    q, k, v, cu_seqlens = make_inputs(lengths, (9, 3), device=device, dtype=dtype)
    ends = cu_seqlens.tolist()

    def attend(q, k, v):
        with torch.no_grad():
            return varlen_attention(q, k, v, cu_seqlens, max(lengths), backend=backend)

    before = attend(q, k, v)
    for start, end in itertools.pairwise(ends):
        changed = torch.zeros(len(q), dtype=torch.bool, device=device)
        changed[start:end] = True
        after = attend(*(torch.where(changed[:, None, None], 3 * x + 1, x) for x in (q, k, v)))
        assert torch.equal(after[~changed], before[~changed])
        assert end == start or not torch.equal(after[changed], before[changed])


@every_backend
def test_no_token_sees_a_later_one(backend, device):
    skip_unless_installed(backend)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v, cu_seqlens = make_inputs([20, 30], (9, 3), device=device, dtype=dtype)

    def attend(k, v):
        with torch.no_grad():
            return varlen_attention(q, k, v, cu_seqlens, 30, backend=backend)

    before = attend(k, v)
    for token in (0, 7, 19, 20, 33, 49):
        k_changed, v_changed = k.clone(), v.clone()
        k_changed[token] += 1
        v_changed[token] += 1
        after = attend(k_changed, v_changed)
        assert torch.equal(after[:token], before[:token])
        assert not torch.equal(after[token], before[token])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@every_backend
def test_the_mask_follows_a_buffer_filled_anew(backend, device, mode):
    """A cu_seqlens of fixed length may be one buffer for every step, changed in place."""
    skip_unless_installed(backend)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch._dynamo.reset()  # see test_inference_mode
    with mode():
        q, k, v, cu_seqlens = make_inputs([3, 4, 5], (9, 3), device=device, dtype=dtype)
        other = make_inputs([6, 4, 2], (9, 3), device=device, dtype=dtype)[3]
        varlen_attention(q, k, v, cu_seqlens, 6, backend=backend)
        expected = varlen_attention(q, k, v, other.clone(), 6, backend=backend)
        cu_seqlens.copy_(other)
        assert torch.equal(varlen_attention(q, k, v, cu_seqlens, 6, backend=backend), expected)


@pytest.mark.parametrize("backend", ["sdpa", "blockwise", "torch_cpu", "flex"])
def test_inference_mode(backend):
    """Inference tensors have no version for the mask's cache to compare."""
    # Without a GPU flex passes its scale through Dynamo, which makes it symbolic once a process has
    # seen several head dimensions. In inference mode torch 2.7 then fails, because its fake tensors
    # keep no symbol of an inference tensor's item: "Data dependent operator".
    torch._dynamo.reset()
    with torch.inference_mode():
        inputs = make_inputs([3, 4], (9, 3))
        ours = varlen_attention(*inputs, 4, backend=backend)
        assert_as_exact(ours, None, dense_attention(*inputs))


def test_a_mask_made_in_inference_mode_serves_training():
    """An evaluation and the step after it may have the same `cu_seqlens`."""
    torch._dynamo.reset()
    *qkv, cu_seqlens = make_inputs([3, 4], (9, 3))
    with torch.inference_mode():
        varlen_attention(*qkv, cu_seqlens, 4, backend="flex")
    made = flex.document_mask.cache_info().misses
    mask = flex.document_mask(cu_seqlens, cu_seqlens._version, 7)
    assert flex.document_mask.cache_info().misses == made, "it is the same mask"
    tensors = [x for x in mask.as_tuple() if isinstance(x, torch.Tensor)]
    assert tensors and not any(x.is_inference() for x in tensors)


@pytest.fixture
def fresh_choice():
    """Clear the choice of backends, which is made once per process."""

    def clear():
        attention._best_backend.cache_clear()
        attention._why_not.cache_clear()

    clear()
    yield
    clear()


def install(monkeypatch, *, flash_attn):
    find_spec = attention.importlib.util.find_spec
    found = types.SimpleNamespace() if flash_attn else None
    monkeypatch.setattr(
        attention.importlib.util,
        "find_spec",
        lambda name: found if name == "flash_attn" else find_spec(name),
    )
    if flash_attn:
        module: Any = types.ModuleType("flash_attn")
        module.flash_attn_varlen_func = None
        monkeypatch.setitem(sys.modules, "flash_attn", module)


@pytest.mark.parametrize(
    ("device", "dtype", "flash_attn", "expected"),
    [
        ("cpu", torch.float32, False, "blockwise"),
        ("cpu", torch.bfloat16, True, "blockwise"),
        ("cpu", torch.float64, True, "sdpa"),
        ("cuda", torch.bfloat16, True, "flash_attn"),
        ("cuda", torch.float16, True, "flash_attn"),
        ("cuda", torch.bfloat16, False, "torch_varlen"),
        ("cuda", torch.float32, True, "flex"),
    ],
)
def test_auto(device, dtype, flash_attn, expected, fresh_choice, monkeypatch, caplog):
    install(monkeypatch, flash_attn=flash_attn)
    with caplog.at_level(logging.INFO, logger=attention.__name__):
        assert resolve_backend("auto", device=device, dtype=dtype) == expected
        assert resolve_backend("auto", device=device, dtype=dtype) == expected
    assert len(caplog.messages) == 1, "said once, not at every layer"
    assert expected in caplog.text
    assert resolve_backend(expected, device=device, dtype=dtype) == expected


def test_flex_takes_no_narrow_heads_on_a_gpu(fresh_choice):
    on_a_gpu = {"device": "cuda", "dtype": torch.float32}
    assert resolve_backend("auto", **on_a_gpu, narrow_heads=True) == "sdpa"
    with pytest.raises(ValueError, match=r"'flex' takes heads of 16 dimensions.* use 'sdpa'"):
        resolve_backend("flex", **on_a_gpu, narrow_heads=True)
    assert resolve_backend("flex", device="cpu", dtype=torch.float32, narrow_heads=True) == "flex"


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "way_out"),
    [
        ("flash_attn", "cpu", torch.bfloat16, "needs a GPU.*use 'sdpa'"),
        ("torch_varlen", "cpu", torch.bfloat16, "needs a GPU.*use 'sdpa'"),
        ("flash_attn", "cuda", torch.bfloat16, "is not installed; use 'torch_varlen'"),
        ("flash_attn", "cuda", torch.float32, "amp_bf16"),
        ("torch_varlen", "cuda", torch.float32, "amp_bf16"),
        ("flash", "cpu", torch.float32, "choose one of auto, flash_attn"),
    ],
)
def test_unusable_backend(backend, device, dtype, way_out, fresh_choice, monkeypatch):
    install(monkeypatch, flash_attn=False)
    with pytest.raises(ValueError, match=f"{backend}.*{way_out}"):
        resolve_backend(backend, device=device, dtype=dtype)


@pytest.mark.parametrize("backend", ["flash_attn", "torch_varlen", "flash"])
def test_unusable_backend_never_falls_back(backend):
    with pytest.raises(ValueError, match=backend):
        varlen_attention(*make_inputs([3], (9, 3)), 3, backend=backend)


class Calls(TorchDispatchMode):
    """The arguments, by name, of every operator called."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names = [argument.name for argument in func._schema.arguments]
        self.seen.append({**dict(zip(names, args, strict=False)), **(kwargs or {})})
        return func(*args, **(kwargs or {}))


def test_torch_varlen_asks_this_torch_for_causal_attention():
    """The function and its arguments change with torch; the meta device needs no GPU."""
    q, k, v, cu_seqlens = make_inputs([8, 2], (9, 3), device="meta", dtype=torch.bfloat16)
    with Calls() as calls:
        out = attention._torch_varlen(q, k, v, cu_seqlens, 8, 0.0)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    [given] = [given for given in calls.seen if "is_causal" in given]
    assert given["is_causal"] is True
    assert (given["max_q"], given["max_k"]) == (8, 8)
