"""Analysis of what training did to the weights: rank of the change, intruder dimensions.

W [out, in] is a linear of the base model, W' of the tuned one, W' - W the change.

- Rank: the smallest number of singular values of the change that hold 90 % of its energy, the sum
  of their squares ("LoRA Learns Less and Forgets Less", arXiv 2405.09673, section 4.5).
- Intruder dimensions (arXiv 2410.21228, algorithm 1): of the K left singular vectors of W' with the
  largest singular values, those whose cosine with every left singular vector of W is below EPSILON.
  The sign of a singular vector is arbitrary, so the absolute cosine is used.

An adapter's change is s * B @ A, whose singular values are exactly those of an r x r matrix;
DoRA's magnitudes make the change dense.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from foundry_ext.adapters import methods
from foundry_ext.adapters.targets import LINEARS
from foundry_ext.analysis.interpolation import measure_line
from foundry_ext.checkpoints.loading import (
    as_folder,
    base_name,
    is_adapter,
    load_model,
    load_tuned,
    recorded_base,
)
from foundry_ext.checkpoints.merge import lora_layers, merge_weights, merged_weight
from foundry_ext.checkpoints.provenance import record_above
from foundry_ext.evaluation.config import EvalSetConfig
from foundry_ext.models.smollm2 import SmolLM2ForCausalLM
from foundry_ext.utils.atomic import write_text
from foundry_ext.utils.errors import UserError

SCHEMA_VERSION = 1
ENERGY = 0.9
K, EPSILON = 10, 0.5
_SAVED_VALUES = 64  # singular values of the change per linear


@dataclass(frozen=True)
class MatrixAnalysis:
    """Analysis of one linear: Frobenius norms, and the change's largest 64 singular values."""

    name: str
    shape: tuple[int, int]
    rank_90: int
    intruders: int
    norm_change: float
    norm_base: float
    singular_values: tuple[float, ...]


@dataclass(frozen=True)
class Change:
    """One linear before and after, and the change's singular values if they are cheap."""

    name: str
    before: Tensor
    after: Tensor
    values: Tensor | None = None


def analyse_weights(
    path: Path | str,
    *,
    base: str | None = None,
    sets: Sequence[EvalSetConfig] | None = None,
) -> dict[str, Any]:
    """Return everything that `foundry-ext analyse` writes.

    Args:
        path: a model folder, an adapter folder, or a Composer checkpoint of either.
        base: the base model; None if the adapter, or the run record above `path`, names it.
        sets: evaluation sets, measured along the line from the base to the tuned weights; None
            omits the line.

    Raises:
        UserError: nothing to analyse, no base model, or one of another shape.
    """
    path = Path(path)
    with as_folder(path) as folder:
        name = base_name(folder, base if base or is_adapter(folder) else recorded_base(path))
        tuned = load_tuned(folder, name, SmolLM2ForCausalLM)
        base_model = None
        if sets is not None or not isinstance(tuned, PeftModel):
            base_model = load_model(name, SmolLM2ForCausalLM)
        if isinstance(tuned, PeftModel):
            matrices = analyse_matrices(adapter_changes(tuned))
        else:
            assert base_model is not None
            matrices = analyse_matrices(full_changes(base_model, tuned))
        line = []
        if sets is not None:
            assert base_model is not None
            line = measure_line(base_model, _merged(tuned), sets, folder, name)
    return {
        "schema_version": SCHEMA_VERSION,
        "model": str(path),
        "base": name,
        "matrices": [asdict(matrix) for matrix in matrices],
        "summary": summarise(matrices),
        "line": line,
    }


def full_changes(base: SmolLM2ForCausalLM, tuned: SmolLM2ForCausalLM) -> Iterator[Change]:
    """Yield all linears of the layers.

    Raises:
        UserError: the two models differ in shape.
    """
    before, after = (dict(model.named_parameters()) for model in (base, tuned))
    if {n: x.shape for n, x in before.items()} != {n: x.shape for n, x in after.items()}:
        raise UserError("the base model has other weights or shapes; pass the right one by --base")
    for name, weight in before.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in LINEARS:
            yield Change(module, weight.detach(), after[name].detach())


@torch.no_grad()
def adapter_changes(model: PeftModel) -> Iterator[Change]:
    """Yield the linears that have an adapter."""
    config = model.peft_config["default"].to_dict()
    for name, layer in lora_layers(model):
        scale = methods.scale_of(config, name)
        before: Any = layer.get_base_layer().weight
        values = None
        if "default" not in layer.lora_magnitude_vector:
            factors: Any = (side["default"].weight for side in (layer.lora_B, layer.lora_A))
            values = scale * singular_values_of_product(*factors)
        yield Change(name, before.detach(), merged_weight(layer, scale).detach(), values)


@torch.no_grad()
def analyse_matrices(changes: Iterator[Change]) -> list[MatrixAnalysis]:
    """Analyse each linear with two decompositions, on the GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    matrices = []
    for change in changes:
        before, after = change.before.to(device), change.after.to(device)
        values, intruders = change.values, 0
        if values is None:
            same = torch.equal(before, after)
            values = torch.zeros(1) if same else torch.linalg.svdvals(after - before)
        if values.any():
            intruders = count_intruders(before, after)
        matrices.append(
            MatrixAnalysis(
                name=change.name,
                shape=(before.shape[0], before.shape[1]),
                rank_90=rank_for_energy(values),
                intruders=intruders,
                norm_change=values.norm().item(),
                norm_base=before.norm().item(),
                singular_values=tuple(float(f"{x:.4g}") for x in values[:_SAVED_VALUES].tolist()),
            )
        )
    return matrices


def singular_values_of_product(B: Tensor, A: Tensor) -> Tensor:
    """Return those of B @ A, [out, r] @ [r, in], from two QR decompositions: [r]."""
    left = torch.linalg.qr(B, mode="r").R
    right = torch.linalg.qr(A.T, mode="r").R
    return torch.linalg.svdvals(left @ right.T)


def rank_for_energy(values: Tensor, share: float = ENERGY) -> int:
    """Return the least number of largest singular values with this share of the energy."""
    energy = values.double().square().sort(descending=True).values.cumsum(0)
    if energy[-1] == 0:
        return 0
    # The margin is for rounding: a sum that should equal the share may fall just short of it.
    return int((energy < (share - 1e-9) * energy[-1]).sum()) + 1


def count_intruders(before: Tensor, after: Tensor, *, k: int = K, epsilon: float = EPSILON) -> int:
    """Count the leading left singular vectors of `after` that resemble none of `before`."""
    old = torch.linalg.svd(before, full_matrices=False).U
    new = torch.linalg.svd(after, full_matrices=False).U[:, :k]
    closest = (old.T @ new).abs().max(dim=0).values
    return int((closest < epsilon).sum())


def summarise(matrices: Sequence[MatrixAnalysis]) -> dict[str, Any]:
    """Summarise all matrices, and those of each kind (q_proj, ...) and layer."""

    def summary(group: Sequence[MatrixAnalysis]) -> dict[str, Any]:
        change, base = (
            math.sqrt(sum(getattr(matrix, key) ** 2 for matrix in group))
            for key in ("norm_change", "norm_base")
        )
        return {
            "matrices": len(group),
            "median_rank_90": median(matrix.rank_90 for matrix in group),
            "total_intruders": sum(matrix.intruders for matrix in group),
            "relative_change": change / base,
        }

    modules: dict[str, list[MatrixAnalysis]] = {}
    layers: dict[str, list[MatrixAnalysis]] = {}
    for matrix in matrices:
        modules.setdefault(matrix.name.rpartition(".")[2], []).append(matrix)
        layers.setdefault(matrix.name.split("layers.")[1].split(".")[0], []).append(matrix)
    return {
        **summary(matrices),
        "energy": ENERGY,
        "k": K,
        "epsilon": EPSILON,
        "by_module": {name: summary(modules[name]) for name in sorted(modules)},
        "by_layer": {name: summary(layers[name]) for name in sorted(layers, key=int)},
    }


def default_output(path: Path) -> Path:
    """Return `analysis.json` beside the record of the run of `path`, else beside `path`."""
    record = record_above(path)
    return (record or path.resolve()).parent / "analysis.json"


def write_analysis(path: Path, analysis: dict[str, Any]) -> None:
    """Write the analysis atomically, as JSON."""
    write_text(path, json.dumps(analysis, indent=1) + "\n")


def _merged(tuned: Any) -> SmolLM2ForCausalLM:
    if isinstance(tuned, PeftModel):
        merge_weights(tuned)
        tuned = tuned.unload()  # pyright: ignore[reportCallIssue]
    assert isinstance(tuned, SmolLM2ForCausalLM)
    return tuned
