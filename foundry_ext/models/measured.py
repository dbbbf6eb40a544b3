"""The fastest attention on this processor, measured once and remembered.

Processors differ in which kernel is the fastest, and nothing tells it but a clock. The measurement
takes about a second. Its result is a file in the user's cache folder, $XDG_CACHE_HOME/foundry_ext
or ~/.cache/foundry_ext, one for each processor, number of threads, torch and dtype; delete the
files to measure again. A missing, broken or unwritable file is no error.

The environment variable FOUNDRY_EXT_CPU_ATTENTION names the choice instead, without a measurement.
A sweep gives it to its runs, and the tests set it.
"""

import contextlib
import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foundry_ext.utils.atomic import replaced_file
from foundry_ext.utils.constants import CPU_ATTENTION
from foundry_ext.utils.errors import UserError

# (q [T, H, N], k [T, K, N], v [T, K, N], cu_seqlens [D+1], max_seqlen) -> [T, H, N]
Attention = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]

_LENGTHS = ((64,) * 16, (1024,))  # tokens of the documents of each pack
_HEADS, _KV_HEADS, _HEAD_DIM = 9, 3, 64  # SmolLM2-135M's
_REPEATS = 3
_PROCESSOR = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags")


def fastest(candidates: Mapping[str, Attention], dtype: torch.dtype) -> str:
    """Return the name of the fastest candidate for training in `dtype` on this processor.

    Raises:
        UserError: the environment variable names none of the candidates.
    """
    given = os.environ.get(CPU_ATTENTION)
    if given:
        if given not in candidates:
            names = ", ".join(candidates)
            raise UserError(
                f"{CPU_ATTENTION}: {given!r} is unknown; choose one of {names}, or unset it"
            )
        return given
    key = _machine(dtype)
    path = _file(key)
    stored = _read(path, candidates)
    if stored is None:
        times = measure(candidates, dtype)
        # Another process may have measured meanwhile; then its choice counts, for both.
        stored = _read(path, candidates)
        if stored is None:
            stored = min(times, key=lambda name: times[name])
            _write(path, {**key, "seconds": times, "fastest": stored})
    return stored


def measure(candidates: Mapping[str, Attention], dtype: torch.dtype) -> dict[str, float]:
    """Return seconds of forward and backward on a pack of short and one of long documents.

    Candidates take turns, and the shortest of several times counts for each pack, because a busy
    machine only ever makes a time longer.
    """
    times = dict.fromkeys(candidates, 0.0)
    # The caller may evaluate, under autocast; and its random numbers must stay as they are.
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        for lengths in _LENGTHS:
            inputs = _inputs(lengths, dtype)
            found: dict[str, list[float]] = {name: [] for name in candidates}
            for _ in range(1 + _REPEATS):  # the first round warms up
                for name, attend in candidates.items():
                    found[name].append(_seconds(attend, inputs))
            for name, samples in found.items():
                times[name] += min(samples[1:])
    return times


_Inputs = tuple[Tensor, Tensor, Tensor, Tensor, int]


def _inputs(lengths: tuple[int, ...], dtype: torch.dtype) -> _Inputs:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(sum(lengths), heads, _HEAD_DIM, generator=generator).to(dtype).requires_grad_()
        for heads in (_HEADS, _KV_HEADS, _KV_HEADS)
    )
    ends = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32)
    return q, k, v, ends, max(lengths)


def _seconds(attend: Attention, inputs: _Inputs) -> float:
    start = perf_counter()
    out = attend(*inputs)
    torch.autograd.grad(out, inputs[:3], out.detach())
    return perf_counter() - start


def _machine(dtype: torch.dtype) -> dict[str, Any]:
    """Return all that the choice depends on."""
    found: dict[str, str] = {"machine": platform.machine()}
    with contextlib.suppress(OSError):  # not Linux
        processor = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
        for line in processor.splitlines():
            name, _, value = line.partition(":")
            if name.strip() in _PROCESSOR:
                found[name.strip()] = value.strip()
    threads = torch.get_num_threads()
    return {**found, "threads": threads, "torch": torch.__version__, "dtype": str(dtype)}


def _file(key: Mapping[str, Any]) -> Path | None:
    """Return the file of this machine's choice, or None if the user has no folder for it."""
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no home
        return None
    return cache / "foundry_ext" / f"cpu_attention-{digest}.json"


def _read(path: Path | None, candidates: Mapping[str, Attention]) -> str | None:
    if path is None:
        return None
    try:
        name = json.loads(path.read_text(encoding="utf-8"))["fastest"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return name if isinstance(name, str) and name in candidates else None


def _write(path: Path | None, content: Mapping[str, Any]) -> None:
    if path is None:
        return
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    with (
        contextlib.suppress(OSError, UserError),
        replaced_file(path, partial=partial) as file,
    ):
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
