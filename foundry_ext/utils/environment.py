"""The environment of a run: package versions, commit, device and compiler."""

import contextlib
import os
import platform
import resource
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# Packages that affect a run's numbers or speed; those not installed are left out.
PACKAGES = (
    *("foundry-ext", "torch", "transformers", "tokenizers", "peft", "datasets", "numpy"),
    *("mosaicml", "llm-foundry", "mosaicml-streaming", "flash-attn", "liger-kernel", "wandb"),
)
_ROOT = Path(__file__).resolve().parents[2]


def describe_environment(*, device_kind: str, world_size: int) -> dict[str, Any]:
    """Return the `environment` of a run's record; records/schema.py describes its keys.

    Args:
        device_kind: "cpu" or "cuda", the device of the run.
        world_size: number of ranks.
    """
    commit, dirty = git_state(_ROOT)
    return {
        "python": platform.python_version(),
        "packages": package_versions(),
        "commit": commit,
        "dirty": dirty,
        "device": device_name(device_kind),
        "device_kind": device_kind,
        "world_size": world_size,
    }


def package_versions() -> dict[str, str]:
    """Return the version of every installed package of `PACKAGES`."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def why_no_kernels() -> str:
    """Return why Triton cannot build its launchers here; empty if it can, as far as one can see."""
    if not any(map(shutil.which, (os.environ.get("CC") or "gcc", "gcc", "clang"))):
        return "no C compiler"
    header = Path(sysconfig.get_path("include"), "Python.h")
    return "" if header.is_file() else f"no {header}, which the package python3-dev has"


def git_state(root: Path) -> tuple[str | None, bool | None]:
    """Return (commit, whether the code differs from it) of the repository at `root`.

    The code differs if a tracked file has changed, or if a file of this package is untracked. Both
    are None if `root` is not a repository, as in an installed copy.
    """
    if not (root / ".git").exists():  # git would search the parent folders for a repository
        return None, None
    commit = _git(root, "rev-parse", "HEAD")
    status = _git(root, "status", "--porcelain", "--untracked-files=all")
    if commit is None or status is None:
        return None, None
    new = ("?? foundry_ext/", "?? train.py")
    lines = status.splitlines()
    return commit.strip(), any(not line.startswith("??") or line.startswith(new) for line in lines)


def _git(root: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            encoding="utf-8",
            errors="replace",  # names of files are bytes
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):  # git is not installed, or hangs
        return None
    return result.stdout if result.returncode == 0 else None


def device_name(device_kind: str) -> str:
    """Return the name of the GPU, such as `NVIDIA H100 80GB HBM3`, or of the processor."""
    if device_kind == "cuda":
        import torch

        return torch.cuda.get_device_name()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def has_gpu() -> bool:
    """Return whether a run of this process would train on a GPU."""
    import torch

    return torch.cuda.is_available()


def peak_memory(device_kind: str) -> int:
    """Return the peak memory of this process in bytes: allocated on the GPU, or resident."""
    if device_kind == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, else kilobytes
