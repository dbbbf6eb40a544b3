"""Values on the null GPU: every operator runs a second time, on the CPU, over the same memory.

The null GPU's memory is the host's, so a CPU tensor can stand on a CUDA tensor's memory. The first
run is the null GPU's: checks, choice of kernels, allocation. The second one computes. It is slow,
and it has no Triton: compiled code and Liger's kernels write nothing.
"""

import ctypes
import itertools
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# Their results' shapes depend on values, so the null GPU cannot run them at all.
_BY_VALUE = {
    *("_local_scalar_dense", "_assert_async", "equal", "is_nonzero", "item"),
    *("nonzero", "masked_select", "repeat_interleave", "_unique2"),
}
_WITHOUT_VALUES = {
    *("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"),
    *("detach", "record_stream", "resize_", "set_"),
}


def on_host(tensor: Tensor) -> Tensor:
    """Return a CPU tensor that stands on a CUDA tensor's memory."""
    storage = tensor.untyped_storage()
    size = storage.nbytes()
    if size == 0 or tensor.numel() == 0:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    memory = (ctypes.c_char * size).from_address(storage.data_ptr())
    raw = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    whole = torch.empty(0, dtype=tensor.dtype)
    return whole.set_(raw, tensor.storage_offset(), tensor.size(), tensor.stride())  # pyright: ignore


class Emulate(TorchDispatchMode):
    """Mode in which CUDA tensors get the values that a GPU would give them, to rounding."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "c10d":  # the null GPU's collectives, of one rank, move the bytes
            return func(*args, **kwargs)
        name = func.name().split("::")[1].split(".")[0]
        if name in _BY_VALUE or (name == "index" and _has_mask(args[1])):
            computed = func(*tree_map(_down, args), **tree_map(_down, kwargs))
            return tree_map(lambda x: _up(x) if isinstance(x, Tensor) else x, computed)
        out = func(*args, **kwargs)
        returns, arguments = func._schema.returns, func._schema.arguments
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        inside = any(_is_cuda(x) for x in tree_leaves((args, kwargs, out)))
        if is_view or not inside or name in _WITHOUT_VALUES:
            return out
        if name in _ATTENTION:
            _ATTENTION[name](out, args, kwargs)
            return out
        computed = func(*tree_map(_down, args), **tree_map(_down, kwargs))
        if not any(a.alias_info is not None and a.alias_info.is_write for a in arguments):
            for gpu, cpu in zip(tree_leaves(out), tree_leaves(computed), strict=True):
                if isinstance(gpu, Tensor):
                    assert (gpu.shape, gpu.dtype) == (cpu.shape, cpu.dtype), name
                    (on_host(gpu) if _is_cuda(gpu) else gpu).copy_(cpu)
        return out


def _is_cuda(x: Any) -> bool:
    return isinstance(x, Tensor) and x.device.type == "cuda"


def _down(x: Any) -> Any:
    if isinstance(x, torch.device):
        return torch.device("cpu")
    return on_host(x) if _is_cuda(x) else x


def _up(x: Tensor) -> Tensor:
    y = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
    on_host(y).copy_(x)
    return y


def _has_mask(indices: Any) -> bool:
    return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in indices)


# --- attention: the CPU has no such operators ---------------------------------------------------


def _dense(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return fp32 (output, log-sum-exp, probabilities) of attention over [..., S, N]."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias.float()
    if causal:
        num_queries, num_keys = scores.shape[-2:]
        # The last query sees every key, as in flash attention; sdpa's causal mask has as many keys.
        hidden = torch.ones(num_queries, num_keys, dtype=torch.bool).triu(
            1 + num_keys - num_queries
        )
        scores = scores.masked_fill(hidden, float("-inf"))
    probabilities = scores.softmax(-1)
    return probabilities @ v, scores.logsumexp(-1), probabilities


def _dense_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    _, _, p = _dense(q, k, v, causal=causal, bias=bias)
    d_p = grad @ v.transpose(-1, -2)
    d_scores = p * (d_p - (d_p * p).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    return d_scores @ k, d_scores.transpose(-1, -2) @ q, p.transpose(-1, -2) @ grad


def _documents(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_keys: Tensor, *more: Tensor
) -> Any:
    """Yield (slice, parts [H, S, N] of each) per document; key/value heads are repeated."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    ends, key_ends = (itertools.pairwise(x.tolist()) for x in (cu_seqlens, cu_keys))
    for (start, end), key_range in zip(ends, key_ends, strict=True):
        if end > start:
            rows, keys = slice(start, end), slice(*key_range)
            parts = [q[rows], k[keys], v[keys], *(x[rows] for x in more)]
            yield rows, [x.float().transpose(0, 1) for x in parts]


def _flash_forward(out: Any, args: Any, kwargs: Any) -> None:
    q, k, v, *ends = (on_host(x) for x in args[:5])
    output, log_sum = on_host(out[0]).zero_(), torch.zeros(q.shape[1], q.shape[0])
    for rows, parts in _documents(q, k, v, *ends):
        o, lse, _ = _dense(*parts, causal=True)
        output[rows] = o.transpose(0, 1).to(output.dtype)
        log_sum[:, rows] = lse
    on_host(out[1]).view(-1)[: log_sum.numel()].copy_(log_sum.flatten())


def _flash_backward(out: Any, args: Any, kwargs: Any) -> None:
    grad, q, k, v, cu_seqlens = (on_host(x) for x in (*args[:4], args[6]))
    gradients = [torch.zeros(*q.shape) for _ in range(3)]
    for rows, (*parts, g) in _documents(q, k, v, cu_seqlens, cu_seqlens, grad):
        for total, part in zip(gradients, _dense_gradients(g, *parts, causal=True), strict=True):
            total[rows] = part.transpose(0, 1)
    heads, groups = k.shape[1], q.shape[1] // k.shape[1]
    summed = [gradients[0], *(g.unflatten(1, (heads, groups)).sum(2) for g in gradients[1:])]
    for gpu, value in zip(out, summed, strict=False):
        on_host(gpu).copy_(value)


def _argument(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    names = [a.name for a in func._schema.arguments]
    position = names.index(name)
    return args[position] if position < len(args) else kwargs.get(name)


def _sdpa(operator: str) -> Any:
    func = getattr(torch.ops.aten, operator).default
    has_bias = any(a.name == "attn_bias" for a in func._schema.arguments)
    is_backward = operator.endswith("backward")

    def compute(out: Any, args: Any, kwargs: Any) -> None:
        q, k, v = (on_host(_argument(func, x, args, kwargs)) for x in ("query", "key", "value"))
        bias = _argument(func, "attn_bias", args, kwargs) if has_bias else None
        causal = bool(_argument(func, "is_causal", args, kwargs))
        used = on_host(bias) if bias is not None and bias.numel() > 0 else None
        options = {"causal": causal, "bias": used}
        groups = q.shape[1] // k.shape[1]
        wide = [x.float().repeat_interleave(groups, 1) for x in (k, v)]
        if not is_backward:
            on_host(out[0]).copy_(_dense(q.float(), *wide, **options)[0])
            return
        gradient = next(a.name for a in func._schema.arguments if a.name.startswith("grad_out"))
        grad = on_host(_argument(func, gradient, args, kwargs)).float()
        for gpu, value in zip(
            out, _dense_gradients(grad, q.float(), *wide, **options), strict=False
        ):
            if isinstance(gpu, Tensor) and gpu.numel():
                heads = gpu.shape[1]
                on_host(gpu).copy_(value.unflatten(1, (heads, value.shape[1] // heads)).sum(2))

    return compute


_ATTENTION = {
    "_flash_attention_forward": _flash_forward,
    "_flash_attention_backward": _flash_backward,
    **{
        name: _sdpa(name)
        for kind in ("flash", "efficient", "cudnn")
        for name in (
            f"_scaled_dot_product_{kind}_attention",
            f"_scaled_dot_product_{kind}_attention_backward",
        )
    },
}
