"""Learning and forgetting along the line from the base model's weights to the tuned ones.

W(alpha) = W + alpha * (W' - W): 0 is the base model, 1 the tuned one, beyond 1 extrapolates.
What is learned early on the line and forgotten late can be kept by stopping before its end.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from foundry_ext.checkpoints.loading import load_tokenizer
from foundry_ext.evaluation.config import EvalSetConfig
from foundry_ext.evaluation.measure import build_sets, measure
from foundry_ext.evaluation.metrics import changes
from foundry_ext.models.scores import BaseStates
from foundry_ext.models.smollm2 import SmolLM2ForCausalLM

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)


def measure_line(
    base: SmolLM2ForCausalLM,
    tuned: SmolLM2ForCausalLM,
    settings: Sequence[EvalSetConfig],
    folder: Path,
    base_name: str,
    alphas: Sequence[float] = ALPHAS,
) -> list[dict[str, Any]]:
    """Measure the sets at every alpha, and their changes against alpha 0, as in a run record.

    The sets are measured in fp32, with the tokenizer of the tuned model's `folder`, else of
    `base_name`. `tuned` is left with the weights of the last alpha.
    """
    tokenizer = load_tokenizer(folder, base_name)
    built = build_sets(settings, tokenizer, base.config.max_position_embeddings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for model in (base, tuned):
        nn.Module.to(model, device)
    end = {name: weight.detach().clone() for name, weight in tuned.named_parameters()}
    line: list[dict[str, Any]] = []
    states = BaseStates(lambda: nullcontext(base))
    for alpha in alphas:
        set_weights(tuned, base, end, alpha)
        metrics, _ = measure(built, tuned, states)
        start = line[0]["metrics"] if line else metrics
        line.append({"alpha": alpha, "metrics": metrics, **changes(settings, start, metrics)})
    return line


@torch.no_grad()
def set_weights(
    model: SmolLM2ForCausalLM,
    base: SmolLM2ForCausalLM,
    end: Mapping[str, torch.Tensor],
    alpha: float,
) -> None:
    """Set all weights of `model` to those at `alpha`; lerp is exact at 0 and at 1."""
    start = dict(base.named_parameters())
    for name, weight in model.named_parameters():
        weight.copy_(torch.lerp(start[name], end[name], alpha))
