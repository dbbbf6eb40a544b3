"""Build the null GPU, and run a process that has it: see README.md beside this file.

By hand, from the project's root:

    python -m tests.nullgpu.kit "RTX 3090" python benchmarks/gpu_counts.py
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULT = "null GPU's result: "
"""Start of the line in which a process returns its result as JSON."""


@dataclasses.dataclass(frozen=True)
class Card:
    """Properties of a card as torch asks for them."""

    name: str
    capability: int
    memory: int
    """Bytes, as torch reports them."""
    multiprocessors: int
    l2: int
    """Bytes of its second-level cache."""


CARDS = {
    "RTX 3090": Card("NVIDIA GeForce RTX 3090", 86, 25_294_995_456, 82, 6 * 2**20),
    "H100": Card("NVIDIA H100 80GB HBM3", 90, 84_987_740_160, 132, 50 * 2**20),
    "H200": Card("NVIDIA H200", 90, 150_110_011_392, 132, 60 * 2**20),
}


@functools.cache
def why_not() -> str:
    """Return why the null GPU cannot be built here, or an empty string."""
    if sys.platform != "linux":
        return "the null GPU needs Linux"
    if shutil.which("gcc") is None:
        return "the null GPU needs gcc"
    if not _headers().is_dir():
        return "the null GPU needs CUDA's headers, which the package triton has"
    import torch.version

    if not (torch.__version__.startswith("2.7.") and (torch.version.cuda or "").startswith("12.")):
        return f"the null GPU stands in for CUDA 12 of torch 2.7, not of {torch.__version__}"
    return ""


def _headers() -> Path:
    spec = importlib.util.find_spec("triton")
    folder = Path(spec.origin).parent if spec and spec.origin else Path("triton")
    return folder / "backends" / "nvidia" / "include"


def build() -> Path:
    """Compile the two libraries, in a second; return their folder, which later calls find."""
    sources = sorted((HERE / "csrc").iterdir())
    content = b"".join(path.read_bytes() for path in sources)
    digest = hashlib.sha256(content + str(_headers()).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir(), f"foundry-ext-nullgpu-{os.getuid()}", digest)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=folder.parent))
        _compile(part / "libnullgpu.so", ["runtime.c", "memory.c", "libraries.c"], "-lpthread")
        names, soname = ["driver.c", "driver_absent.c"], "-Wl,-soname,libcuda.so.1"
        _compile(part / "libcuda.so.1", names, soname, "-ldl")
        (part / "libcuda.so").symlink_to("libcuda.so.1")
        with contextlib.suppress(OSError):  # another process was faster
            part.rename(folder)
    return folder


def _compile(library: Path, names: list[str], *options: str) -> None:
    command = ["gcc", "-O2", "-shared", "-fPIC", "-w", f"-I{_headers()}", "-o", str(library)]
    command += [str(HERE / "csrc" / name) for name in names]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def environment(card: str) -> dict[str, str]:
    """Return the environment of a process that has the card."""
    libraries, chosen = build(), CARDS[card]
    return {
        **os.environ,
        "LD_PRELOAD": str(libraries / "libnullgpu.so"),
        "LD_LIBRARY_PATH": str(libraries),
        "TRITON_LIBCUDA_PATH": str(libraries),
        "NULLGPU_LIBRARIES": str(libraries),
        "NULLGPU_NAME": chosen.name,
        "NULLGPU_CAPABILITY": str(chosen.capability),
        "NULLGPU_MEMORY": str(chosen.memory),
        "NULLGPU_SMS": str(chosen.multiprocessors),
        "NULLGPU_L2": str(chosen.l2),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "0",
    }


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Hold the lock of all processes with the null GPU: each may take gigabytes and a core."""
    with filelock.FileLock(build().parent / "lock"):
        yield


def run(module: str, *arguments: str, card: str | None = "RTX 3090", **variables: str) -> Any:
    """Run `python -m module` with the card, and return the result that it hands to `give`.

    Without a card, which is None, it runs on the CPU.
    """
    output = output_of(module, *arguments, card=card, **variables)
    results = [line for line in output.splitlines() if line.startswith(RESULT)]
    return json.loads(results[-1].removeprefix(RESULT))


def output_of(module: str, *arguments: str, card: str | None = "RTX 3090", **variables: str) -> str:
    """Run `python -m module` with the card; return what it prints, after checking that it ends."""
    command = [sys.executable, "-m", module, *arguments]
    without = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    settings = {**(environment(card) if card else without), **variables}
    with one_at_a_time():
        done = subprocess.run(
            command, env=settings, cwd=ROOT, capture_output=True, text=True, timeout=900
        )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def give(result: Any) -> None:
    """Return a result, which JSON can hold, from a process that `run` has started."""
    print(RESULT + json.dumps(result), flush=True)


if __name__ == "__main__":
    os.execvpe(sys.argv[2], sys.argv[2:], environment(sys.argv[1]))
