"""torch.compile for packs of one shape: norms, rotary, SwiGLU and residuals fused around products.

`layers` compiles the decoder layer once for all of them, since they differ in their weights only:
seconds to compile, whatever the number of layers. `model` compiles all layers as one graph: minutes
for thirty of them, and no more than the seams between layers to gain. Attention stays one operator
in either, see models/attention.py. Weights keep their names.
"""

from typing import Any

import torch

from foundry_ext.models.smollm2 import SmolLM2ForCausalLM, decoder_layer, run_layers
from foundry_ext.utils.errors import UserError

SCOPES = ("none", "layers", "model")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def check_compile(scope: str, mode: str) -> None:
    """Raises ValueError for an unknown `compile` or `compile_mode`."""
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
    """Compiles at the first training step, in place; evaluation, of any shape, stays as it is.

    Args:
        scope: none, layers or model.
        mode: torch.compile's; "reduce-overhead" records CUDA graphs.
        dynamic: one code for all numbers of tokens, slower than one for a fixed number, which
            every pack of another shape would compile anew.

    Raises:
        UserError: unknown scope or mode.
    """
    check_compile(scope, mode)
    # Not fullgraph: flex and sdpa, which the compiler does not enter, cut a layer in two.
    options: dict[str, Any] = {"dynamic": dynamic, "mode": mode}
    model.model.compiled = None
    if scope == "model":
        model.model.compiled = torch.compile(run_layers, **options)
    layer = torch.compile(decoder_layer, **options) if scope == "layers" else None
    for module in model.model.layers:
        module.compiled = layer  # pyright: ignore[reportArgumentType]


def graphs_compiled() -> int:
    """By this process so far; for tests and the benchmark."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
