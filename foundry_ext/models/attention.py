"""Causal attention over documents laid end to end: one signature, several kernels.

T tokens, D documents, H query heads, K key/value heads (H a multiple of K), N head dimension. Names
such as `q_THN` state the shape. `cu_seqlens` [D+1] int32 holds 0 and the end of every document. A
query sees the keys of its own document up to its own position; no backend sees across documents.

Example: cu_seqlens 0 3 5 means documents of tokens 0-2 and 3-4; token 3 sees only itself.
"""

import functools
import importlib.util
import inspect
import logging
from collections.abc import Callable
from textwrap import shorten

import torch
import torch.nn.functional as F
from torch import Tensor

from foundry_ext.models import measured
from foundry_ext.models.blockwise import blockwise_attention
from foundry_ext.models.flex import LEAST_HEAD, flex_varlen_attention
from foundry_ext.models.torch_cpu import torch_cpu_attention
from foundry_ext.utils.errors import UserError

log = logging.getLogger(__name__)

BACKENDS = ("auto", "flash_attn", "torch_varlen", "flex", "blockwise", "torch_cpu", "sdpa")
CPU_BACKENDS = ("blockwise", "torch_cpu", "sdpa")
"""The backends that "auto" measures on a CPU."""
_HALF = (torch.float16, torch.bfloat16)

Keys = tuple[Tensor, int] | None
"""cu_seqlens and max_seqlen of keys and values, if these are not the queries' tokens."""


def varlen_attention(
    q_THN: Tensor,
    k_TKN: Tensor,
    v_TKN: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    backend: str = "auto",
    dropout_p: float = 0.0,
    keys: Keys = None,
) -> Tensor:
    """Compute causal attention within each document, with softmax scale N**-0.5.

    Args:
        q_THN: queries; the flash backends take fp16 and bf16 only.
        k_TKN: keys, of the same dtype and device.
        v_TKN: values, of the same dtype and device.
        cu_seqlens: [D+1] int32, from 0 to T; repeated values are empty documents.
        max_seqlen: a Python int that no document exceeds. Keep it constant over a run: a tensor
            synchronises, and a value that changes recompiles.
        backend: one of `BACKENDS`; "auto" is `resolve_backend`'s choice.
        dropout_p: probability of setting an attention weight to zero; the others are scaled by
            1 / (1 - dropout_p). Pass 0 outside training.
        keys: for flash backends, if a document has more keys than queries: the last query sees all
            keys, the one before it all but the last, and so on.

    Returns:
        [T, H, N] in the dtype of `v_TKN`.

    Raises:
        UserError: the backend is unknown or unusable.
    """
    device, dtype = q_THN.device.type, v_TKN.dtype
    # The compiler may keep a comparison as a symbol, and resolve_backend needs its value.
    dropout, narrow = bool(dropout_p > 0), bool(q_THN.shape[-1] < LEAST_HEAD)
    backend = resolve_backend(
        backend, device=device, dtype=dtype, dropout=dropout, narrow_heads=narrow
    )
    if keys is not None:
        kernel = {"flash_attn": _flash_attn, "torch_varlen": _torch_varlen}[backend]
        return kernel(q_THN, k_TKN, v_TKN, cu_seqlens, max_seqlen, dropout_p, keys)
    return _KERNELS[backend](q_THN, k_TKN, v_TKN, cu_seqlens, max_seqlen, dropout_p)


@torch.compiler.assume_constant_result  # the compiler need not trace the choice
def resolve_backend(
    backend: str,
    *,
    device: str,
    dtype: torch.dtype,
    dropout: bool = False,
    narrow_heads: bool = False,
) -> str:
    """Return the best backend for this device and dtype if "auto", else check the named one.

    Args:
        backend: one of `BACKENDS`.
        device: a type, such as "cuda".
        dtype: of the values.
        dropout: whether attention weights are dropped.
        narrow_heads: whether a head has fewer than 16 dimensions.

    Raises:
        UserError: the backend is unknown, not installed, or does not support one of the above.
    """
    if backend == "auto":
        return _best_backend(device, dtype, dropout, narrow_heads)
    if backend not in BACKENDS:
        raise UserError(
            f"attention_backend: {backend!r} is unknown; choose one of {', '.join(BACKENDS)}"
        )
    problem = _why_not(backend, device, dtype, dropout, narrow_heads)
    if problem:
        raise UserError(f"attention_backend: {backend!r} {problem}")
    return backend


@functools.cache
def _best_backend(device: str, dtype: torch.dtype, dropout: bool, narrow_heads: bool) -> str:
    settings = (device, dtype, dropout, narrow_heads)
    usable = [name for name in BACKENDS[1:] if not _why_not(name, *settings, auto=True)]
    best = usable[0]
    if device == "cpu" and len(usable) > 1:
        kernels = {name: functools.partial(_attend, name) for name in CPU_BACKENDS}
        best = measured.fastest(kernels, dtype)
    log.info("attention_backend: auto chose %r for %s on %s", best, dtype, device)
    return best


def _attend(
    backend: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> Tensor:
    return _KERNELS[backend](q, k, v, cu_seqlens, max_seqlen, 0.0)


@functools.cache
def _why_not(
    backend: str,
    device: str,
    dtype: torch.dtype,
    dropout: bool,
    narrow_heads: bool,
    auto: bool = False,
) -> str:
    """Return why a backend cannot run here, and the way out; "" if it can."""
    if backend == "sdpa":
        return ""
    without_dropout = ["flex", "blockwise", "torch_cpu"]
    without_dropout += ["torch_varlen"] if _has_varlen_module() else []
    if dropout and backend in without_dropout:
        return "does not support attention_dropout; use 'flash_attn' or 'sdpa', or set it to 0"
    if backend in ("blockwise", "torch_cpu"):
        if device != "cpu":
            return f"runs on a CPU only, but this tensor is on {device}; use 'sdpa'"
        return f"computes in fp32, not in {dtype}; use 'sdpa'" if dtype == torch.float64 else ""
    if backend == "flex":
        if device != "cuda":
            # It runs uncompiled, with all T x T scores: useful only as a reference.
            return "needs a GPU; use 'sdpa'" if auto else ""
        least = f"takes heads of {LEAST_HEAD} dimensions or more on a GPU; use 'sdpa'"
        return least if narrow_heads else ""
    if device != "cuda":
        return f"needs a GPU, but this tensor is on {device}; use 'sdpa'"
    if dtype not in _HALF:
        return f"needs fp16 or bf16, not {dtype}; set precision: amp_bf16, or use 'flex' or 'sdpa'"
    return _why_no_flash() if backend == "flash_attn" else ""


def _why_no_flash() -> str:
    """Return why flash-attn cannot be imported; its binary fits one torch and one CUDA only."""
    if importlib.util.find_spec("flash_attn") is None:
        return "is not installed; use 'torch_varlen', torch's own copy of its kernels"
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401 # pyright: ignore
    except (ImportError, OSError, RuntimeError) as error:
        problem = (
            f"was not built for torch {torch.__version__}; rebuild it, pip install --no-deps"
            " --no-build-isolation --force-reinstall --no-binary flash-attn flash-attn, or use"
            f" 'torch_varlen' ({shorten(str(error), 160, placeholder=' ...')})"
        )
        log.warning("attention_backend: 'flash_attn' %s", problem)
        return problem
    return ""


@torch.compiler.assume_constant_result
def _has_varlen_module() -> bool:
    """Return whether torch has varlen_attn, as 2.10 and later do.

    It takes no dropout; the operator that older versions use does.
    """
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None


def _repeat_heads(x_TKN: Tensor, num_heads: int) -> Tensor:
    """Repeat each key/value head for its group of H/K query heads: [T, K, N] -> [T, H, N]."""
    groups = num_heads // x_TKN.shape[1]
    return x_TKN if groups == 1 else x_TKN.repeat_interleave(groups, dim=1)


def _flash_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float,
    keys: Keys = None,
) -> Tensor:
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    cu_keys, max_keys = keys or (cu_seqlens, max_seqlen)
    lengths = (cu_seqlens, cu_keys, max_seqlen, max_keys)
    return flash_attn_varlen_func(q, k, v, *lengths, dropout_p=dropout_p, causal=True)


def _torch_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float,
    keys: Keys = None,
) -> Tensor:
    cu_keys, max_keys = keys or (cu_seqlens, max_seqlen)
    lengths = (cu_seqlens, cu_keys, max_seqlen, max_keys)
    if not _has_varlen_module():
        # The operator takes fewer key/value heads than query heads, as its kernels do.
        forward = torch.ops.aten._flash_attention_forward
        options = (dropout_p, True, False)  # is_causal, return_debug_mask
        return forward(q, k, v, *lengths, *options)[0]  # pyright: ignore[reportCallIssue]
    from torch.nn.attention.varlen import varlen_attn  # pyright: ignore[reportMissingImports]

    k, v = _repeat_heads(k, q.shape[1]), _repeat_heads(v, q.shape[1])
    causal = {"is_causal": True} if _has_is_causal() else {"window_size": (-1, 0)}
    return varlen_attn(q, k, v, *lengths, **causal)


@torch.compiler.assume_constant_result
def _has_is_causal() -> bool:
    """Return whether varlen_attn has `is_causal`, as in torch 2.10; later it has a window."""
    from torch.nn.attention.varlen import varlen_attn  # pyright: ignore[reportMissingImports]

    return "is_causal" in inspect.signature(varlen_attn).parameters


def _plain(attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, v, cu_seqlens, _max_seqlen, _dropout_p: attend(q, k, v, cu_seqlens)


@torch.compiler.disable  # it reads lengths on the host, so each pack would recompile
def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout_p: float
) -> Tensor:
    """Attend within one document at a time: the reference, which runs on any device."""
    lengths = cu_seqlens.diff().tolist()
    k, v = _repeat_heads(k, q.shape[1]), _repeat_heads(v, q.shape[1])
    # Split, not sliced: each slice would have a gradient as large as all documents together.
    by_document = (x.transpose(0, 1)[None].split(lengths, dim=2) for x in (q, k, v))
    attended = [
        F.scaled_dot_product_attention(q_i, k_i, v_i, dropout_p=dropout_p, is_causal=True)
        for q_i, k_i, v_i in zip(*by_document, strict=True)
        if q_i.shape[2] > 0
    ]
    return torch.cat(attended, dim=2)[0].transpose(0, 1)


_KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, int, float], Tensor]] = {
    "flash_attn": _flash_attn,
    "torch_varlen": _torch_varlen,
    "flex": _plain(flex_varlen_attention),
    "blockwise": _plain(blockwise_attention),
    "torch_cpu": _plain(torch_cpu_attention),
    "sdpa": _sdpa,
}
