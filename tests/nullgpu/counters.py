"""Counts of the null GPU's work: operations, kernels by name, waits of the host by place."""

import collections
import contextlib
import ctypes
import dataclasses
import os
import shutil
import subprocess
import traceback
from collections.abc import Iterator
from pathlib import Path

_FOLDER = Path(os.environ["NULLGPU_LIBRARIES"])
_RUNTIME = ctypes.CDLL(str(_FOLDER / "libnullgpu.so"))
_DRIVER = ctypes.CDLL(str(_FOLDER / "libcuda.so.1"))
_RUNTIME.nullgpu_count.restype = ctypes.c_uint64
_RUNTIME.nullgpu_flops.restype = ctypes.c_double
_RUNTIME.nullgpu_name.restype = ctypes.c_char_p
_KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_uint64)
_WAIT = ctypes.CFUNCTYPE(None, ctypes.c_char_p)


@dataclasses.dataclass
class Counts:
    """Counts of one piece of work."""

    calls: dict[str, int] = dataclasses.field(default_factory=dict)
    """Counts by kind: launch, driver_launch (Triton's), gemm, memset, copy_d2d, wait, ..."""
    kernels: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    """Launches by the kernel's name, matrix products excepted."""
    waits: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    """Calls for which the host waits, by kind, file and line."""
    gemm_flops: float = 0.0
    """FLOPs of the matrix products; attention's are in its kernels, and not counted."""

    @property
    def operations(self) -> int:
        """Operations that the device executes: kernels, matrix products, memsets, its copies."""
        kinds = ("launch", "driver_launch", "gemm", "memset", "copy_d2d", "graph_launch")
        return sum(self.calls[kind] for kind in kinds)


@contextlib.contextmanager
def counting() -> Iterator[Counts]:
    """Count what the body asks of the device. The result is complete at its end."""
    found = Counts()

    @_WAIT
    def on_wait(call: bytes) -> None:
        found.waits[f"{call.decode()} at {_place()}"] += 1

    _RUNTIME.nullgpu_reset()
    _DRIVER.nullcuda_reset()
    _RUNTIME.nullgpu_on_wait(on_wait)
    try:
        yield found
    finally:
        _RUNTIME.nullgpu_on_wait(None)
        found.calls = _calls()
        found.kernels = _kernels()
        found.gemm_flops = _RUNTIME.nullgpu_flops()


def _place() -> str:
    """Return the innermost place outside torch from which a call came, as file:line."""
    stack = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
    ours = [frame for frame in stack if "/site-packages/torch/" not in frame.filename]
    frame = (ours or stack)[-1]
    return f"{frame.filename.split('site-packages/')[-1]}:{frame.lineno}"


def _calls() -> dict[str, int]:
    names: list[str] = []
    while (name := _RUNTIME.nullgpu_name(len(names))) is not None:
        names.append(name.decode())
    return {name: _RUNTIME.nullgpu_count(i) for i, name in enumerate(names)}


def _kernels() -> collections.Counter[str]:
    found: collections.Counter[str] = collections.Counter()

    @_KERNEL
    def add(name: bytes, launches: int) -> None:
        found[name.decode()] += launches

    _RUNTIME.nullgpu_kernels(add)
    _DRIVER.nullcuda_kernels(add)
    filt = shutil.which("c++filt")
    if not (found and filt):
        return found
    # Without the preloaded library, which c++filt does not need.
    names = subprocess.run(
        [filt, "-p"], input="\n".join(found), capture_output=True, text=True, env={}
    ).stdout.splitlines()
    readable: collections.Counter[str] = collections.Counter()
    for name, launches in zip(names, found.values(), strict=True):
        readable[name] += launches
    return readable
