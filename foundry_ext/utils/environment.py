"""Where a run took place: package versions, commit, device."""

import platform
import resource
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# What decides a run's numbers or its speed; those not installed are left out.
PACKAGES = (
    *("foundry-ext", "torch", "transformers", "tokenizers", "peft", "datasets", "numpy"),
    *("mosaicml", "llm-foundry", "mosaicml-streaming", "flash-attn", "liger-kernel", "wandb"),
)
_ROOT = Path(__file__).resolve().parents[2]


def describe_environment(*, device_kind: str, world_size: int) -> dict[str, Any]:
    """The `environment` of a run's record, see records/schema.py.

    Args:
        device_kind: "cpu" or "cuda", what the run computes on.
        world_size: ranks of the run.
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
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_state(root: Path) -> tuple[str | None, bool | None]:
    """Commit of the repository at `root`, and whether its code differs from it.

    That is a change to a file git knows, or a new one among this package's; (None, None) where
    `root` is no repository, as in an installed copy.
    """
    if not (root / ".git").exists():  # else git would answer for a repository further up
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
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):  # no git here
        return None
    return done.stdout if done.returncode == 0 else None


def device_name(device_kind: str) -> str:
    """`NVIDIA H100 80GB HBM3`, or the processor's name."""
    if device_kind == "cuda":
        import torch

        return torch.cuda.get_device_name()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def peak_memory(device_kind: str) -> int:
    """Bytes: most ever allocated on the GPU, or the most this process has held in memory."""
    if device_kind == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere but there
