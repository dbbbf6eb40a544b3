"""The machine that a figure was measured on, and the versions of packages."""

import importlib.metadata
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "peft", "flash-attn", "liger-kernel", "triton")


def describe_machine(device: str) -> dict[str, Any]:
    """Return the device's name, threads, date and the versions of installed packages."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "python": platform.python_version(),
        **{name: version for name in PACKAGES if (version := installed(name))},
        "torch": torch.__version__,  # with its build tag
    }


def cpu_name() -> str:
    """Return the processor's name, and the extension that decides how fast bf16 is."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    found = {line.split(":")[0].strip(): line.split(":")[-1].strip() for line in lines if line}
    name = found.get("model name", platform.machine())
    fast = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in found.get("flags", "").split()]
    return f"{name} with {fast[0]}" if fast else name


def installed(package: str) -> str | None:
    """Return the package's version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def as_line(machine: dict[str, Any]) -> str:
    """Return one line to print above figures."""
    versions = (f"{name} {machine[name]}" for name in ("python", *PACKAGES) if machine.get(name))
    return f"{machine['device']}, {machine['threads']} threads; {', '.join(versions)}"
