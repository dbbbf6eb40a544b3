"""Composer's .pt checkpoints, read by torch's restricted unpickler, which runs no code.

Composer itself unpickles them unrestricted (0.32.1, _torch_load_with_validation). Besides tensors
and plain Python they hold clocks, torch's version and numpy's random state.
"""

from datetime import timedelta
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

# The function that numpy names in a pickled array.
from numpy._core.multiarray import _reconstruct  # pyright: ignore
from torch.torch_version import TorchVersion

from foundry_ext.utils.errors import UserError

_HARMLESS: list[Any] = [
    timedelta,
    TorchVersion,
    np.ndarray,
    np.dtype,
    _reconstruct,
    *(type(np.dtype(kind)) for kind in ("uint32", "int64", "float32", "float64")),
]


def load_checkpoint(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """Return the checkpoint's content, on the CPU; `mmap` leaves tensors on the disk until needed.

    Raises:
        UserError: it holds a class or function outside `_HARMLESS`; names it.
    """
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except UnpicklingError as error:
        foreign = _foreign(path)
        if not foreign:
            raise
        raise UserError(
            f"{path} holds {', '.join(foreign)}, which could run code when it is read; Composer's"
            " checkpoints hold no such thing. If you trust it, allow the name in a module of"
            " code_paths, with torch.serialization.add_safe_globals"
        ) from error


def describe_foreign(content: Any) -> str | None:
    """Return what a loaded file holds instead of a run's state, or None."""
    if isinstance(content, dict) and isinstance(content.get("state"), dict):
        return None
    kind = "a dict without state" if isinstance(content, dict) else f"a {type(content).__name__}"
    return f"holds {kind}, not the state of a run"


def _foreign(path: Path) -> list[str]:
    with torch.serialization.safe_globals(_HARMLESS):
        try:
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
        except Exception:  # not torch's format at all
            return []
