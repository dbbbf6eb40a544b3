"""torch.compile for packs of one shape: it fuses norms, rotary, SwiGLU and residuals.

`layers` compiles one decoder layer for all layers, because they differ only in their weights. That
takes seconds, whatever the number of layers. `model` compiles all layers as one graph. That takes
minutes for thirty layers, and gains only fusions between layers. In both, attention stays one
operator, as models/attention.py describes. Weights keep their names.
"""

from typing import Any

import torch

from foundry_ext.models.decoder import decoder_layer, run_layers
from foundry_ext.models.smollm2 import SmolLM2ForCausalLM
from foundry_ext.utils.errors import UserError

SCOPES = ("none", "layers", "model")
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
    """Make training steps compiled, in place; evaluation, whose shapes vary, is not compiled.

    Compilation happens at the first training step.

    Args:
        model: the model to change.
        scope: none, layers or model.
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


def graphs_compiled() -> int:
    """Return the number of graphs this process has compiled, for tests and the benchmark."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
