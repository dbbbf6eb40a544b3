"""Composer's .pt checkpoints, read by torch's restricted unpickler: none of them can run code.

Composer itself reads them as any pickle (0.32.1, _torch_load_with_validation). Beside tensors and
plain Python a checkpoint of it holds clocks, the version of torch and numpy's random state.
"""

from datetime import timedelta
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

# What numpy pickles an array as.
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
    """The checkpoint's content, on the CPU.

    Args:
        mmap: leaves the tensors on the disk until they are looked at.

    Raises:
        UserError: it holds a class or function that is none of the harmless ones; names it.
    """
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except UnpicklingError as error:
        foreign = _foreign(path)
        if not foreign:
            raise
        raise UserError(
            f"{path} holds {', '.join(foreign)}, which could run code when it is read; a checkpoint"
            " of Composer holds none. If you trust it, allow the name in a module of code_paths,"
            " with torch.serialization.add_safe_globals"
        ) from error


def _foreign(path: Path) -> list[str]:
    with torch.serialization.safe_globals(_HARMLESS):
        try:
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
        except Exception:  # not in torch's format at all
            return []
