"""The attention backend of a run, chosen once and kept when the run resumes.

On a GPU "auto" depends on nothing but the device and the dtype. On a CPU it depends on a
measurement (models/measured.py), so the name that it chose stands in every checkpoint, and a run
that resumes takes it from there instead of choosing again: its result has the same bits.
"""

import logging
from typing import Any

import torch

from foundry_ext.models.attention import CPU_BACKENDS, resolve_backend
from foundry_ext.models.smollm2 import SmolLM2ForCausalLM
from foundry_ext.training.refusals import on_rank_zero

log = logging.getLogger(__name__)


def check_backend(backend: str) -> None:
    """Refuse an attention backend that this machine lacks.

    Raises:
        UserError: it is unknown or unusable here.
    """
    if backend != "auto":
        # The trainer's device is not known yet, but it is the GPU if there is one.
        device = "cuda" if torch.cuda.is_available() else "cpu"
        resolve_backend(backend, device=device, dtype=torch.bfloat16)


def use_backend(model: SmolLM2ForCausalLM, backend: str) -> None:
    """Give the model its attention backend, on a CPU the one that "auto" stands for.

    A collective: rank 0 chooses for all.

    Raises:
        UserError: the backend is unusable here, or has no dropout although the model needs it.
    """
    dropout = model.config.attention_dropout > 0
    if torch.cuda.is_available():
        resolve_backend(backend, device="cuda", dtype=torch.bfloat16, dropout=dropout)
    else:
        # Composer trains in fp32 on a CPU.
        fp32 = {"device": "cpu", "dtype": torch.float32, "dropout": dropout}
        backend = on_rank_zero(lambda: resolve_backend(backend, **fp32))
    model.attention_backend = backend


def used_backend(model: Any) -> str | None:
    """Return the backend of a Composer model of ours, else None; "auto" on a GPU."""
    inner = getattr(model, "inner_model", None)
    return inner.attention_backend if isinstance(inner, SmolLM2ForCausalLM) else None


def keep_backend(model: Any, stored: str | None) -> None:
    """Let a run that resumes continue with the backend of its checkpoint.

    That is for "auto" on a CPU only, because a YAML that names a backend means it.

    Args:
        model: the Composer model.
        stored: what `used_backend` returned when the checkpoint was written; None if that was
            before checkpoints held it, when "auto" was blockwise.
    """
    if used_backend(model) is None or model.attention_backend != "auto":
        return
    inner = model.inner_model
    if stored is None:
        stored = "sdpa" if inner.config.attention_dropout > 0 else "blockwise"
    if inner.attention_backend == stored or not {inner.attention_backend, stored} <= {
        *CPU_BACKENDS
    }:
        return  # the same, or one of them is a GPU's
    log.info("attention_backend: auto stays %r, as in the checkpoint", stored)
    inner.attention_backend = stored
