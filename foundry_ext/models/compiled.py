"""torch.compile for packs of one shape: it fuses norms, rotary, SwiGLU and residuals.

`layers` compiles one decoder layer for all layers, because they differ only in their weights. That
takes seconds, whatever the number of layers. `model` compiles all layers as one graph. That takes
minutes for thirty layers, and gains only fusions between layers. In both, attention stays one
operator, as models/attention.py describes. Weights keep their names.

Evaluation, whose shapes vary, is not compiled as a whole. In a GPU's passes over packs, norm,
rotary and SwiGLU are compiled alone, into a few kernels that serve any number of tokens.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from foundry_ext.models.decoder import (
    PLAIN,
    Pieces,
    decoder_layer,
    rms_norm,
    rotate,
    run_layers,
    swiglu,
)
from foundry_ext.models.smollm2 import SmolLM2ForCausalLM
from foundry_ext.utils.errors import UserError

SCOPES = ("auto", "none", "layers", "model")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def check_compile(scope: str, mode: str) -> None:
    """Raise UserError for an unknown value of `compile` (scope) or `compile_mode` (mode)."""
    for key, value, known in (("compile", scope, SCOPES), ("compile_mode", mode, MODES)):
        if value not in known:
            raise UserError(f"{key}: {value!r} is unknown; choose one of {', '.join(known)}")


def compile_model(
    model: SmolLM2ForCausalLM,
    *,
    scope: str = "layers",
    mode: str = "default",
    dynamic: bool = False,
) -> None:
    """Make training steps compiled, in place, and a GPU's evaluation fused.

    Compilation happens at the first step, of training and of evaluation.

    Args:
        model: the model to change.
        scope: auto, none, layers or model. "auto" is "none": train.py decides otherwise before the
            model is built.
        mode: torch.compile's mode; "reduce-overhead" records CUDA graphs.
        dynamic: compile once for any number of tokens. That code is slower than code for a fixed
            number, which is compiled again for every new shape.

    Raises:
        UserError: the scope or mode is unknown.
    """
    check_compile(scope, mode)
    # Not fullgraph: flex and sdpa, which are not traced, break a layer's graph in two.
    options: dict[str, Any] = {"dynamic": dynamic, "mode": mode}
    model.model.compiled = None
    if scope == "model":
        model.model.compiled = torch.compile(run_layers, **options)
    layer = torch.compile(decoder_layer, **options) if scope == "layers" else None
    for module in model.model.layers:
        module.compiled = layer  # pyright: ignore[reportArgumentType]
    fuse_evaluation(model, scope in ("layers", "model"))


def fuse_evaluation(model: SmolLM2ForCausalLM, on: bool = True) -> None:
    """Make a GPU's passes over packs without gradients use compiled norm, rotary and SwiGLU."""
    model.model.evaluation_pieces = _fused_pieces() if on else PLAIN


@functools.cache
def _fused_pieces() -> Pieces:
    norm = torch.compile(_norm_and_cast, dynamic=True)

    def norm_for_linear_layers(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return norm(x, weight, eps, _linear_dtype(x))

    return Pieces(
        norm_for_linear_layers,
        torch.compile(rotate, dynamic=True),
        torch.compile(swiglu, dynamic=True),
    )


def _norm_and_cast(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Normalise, and cast once for all linear layers that take the result."""
    return rms_norm(x, weight, eps).to(dtype)


def _linear_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a linear layer takes `x`: autocast's, where that is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def graphs_compiled() -> int:
    """Return the number of graphs this process has compiled, for tests and the benchmark."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
