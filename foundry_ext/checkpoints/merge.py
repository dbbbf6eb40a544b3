"""Adapters merged into their base models, with a certificate that the model is unchanged.

Merging is in fp32, by formulas written here independently of peft. LoRA and rsLoRA:
W + scale * B @ A. DoRA: m * V / |V| by rows, with V = W + scale * B @ A. The certificate compares
with the trained model, its adapter unmerged, whose logits peft computes.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from foundry_ext.adapters import methods
from foundry_ext.adapters.pissa import adapters_off
from foundry_ext.checkpoints.export import refuse_folder_in_use
from foundry_ext.checkpoints.loading import (
    CERTIFICATE,
    as_folder,
    base_name,
    is_adapter,
    load_model,
    load_tokenizer,
    load_tuned,
)
from foundry_ext.checkpoints.model_card import Weights, has_patterns, write_card
from foundry_ext.checkpoints.provenance import provenance_of
from foundry_ext.utils.atomic import replaced_folder
from foundry_ext.utils.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Largest difference of a logit. In fp32 it is rounding. In bf16 every weight is off by up to 2^-9
# of itself, which is the price of the cast, with or without an adapter.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5}
_PACKAGES = ("foundry-ext", "torch", "transformers", "peft")
_WINDOW, _WINDOWS = 512, 4  # tokens of a forward pass, and how many: logits are kept

TEXT = """\
The lighthouse keeper counted the ships twice that evening, because the fog had come in early and \
the bell on the northern rocks no longer answered. "There were seven this morning," he wrote, "and \
I can account for six." By midnight the wind had turned, and with it the smell of the sea.

Water boils at a lower temperature on a mountain than at the coast, since the air above presses \
less upon its surface. A cook who moves uphill therefore waits longer for an egg to set.

Question: A baker sells 14 loaves in the morning and half as many in the afternoon. Each loaf \
costs 3 dollars. How much does she earn in a day?
Answer: In the afternoon she sells 14 / 2 = 7 loaves, which makes 14 + 7 = 21 loaves in all. She \
earns 21 * 3 = 63 dollars. #### 63

def running_mean(values, window):
    \"\"\"The mean of the last `window` values at every position.\"\"\"
    total, means = 0.0, []
    for index, value in enumerate(values):
        total += value
        if index >= window:
            total -= values[index - window]
        means.append(total / min(index + 1, window))
    return means
"""


@dataclass(frozen=True)
class LogitDifference:
    """Differences over all positions and the vocabulary; agreement is on the likeliest token."""

    largest: float
    mean: float
    argmax_agreement: float


def merge_adapter(
    adapter: Path | str,
    out: Path | str,
    *,
    base: str | None = None,
    dtype: str = "float32",
    tolerance: float | None = None,
    text: str = TEXT,
) -> dict[str, Any]:
    """Write the merged model, as a folder that stock transformers loads, its certificate and card.

    Args:
        adapter: a peft folder, or a Composer checkpoint of an adapter.
        out: a new or empty folder; nothing is left there after an error.
        base: the base model, if not the one that the adapter names.
        dtype: dtype of the weights written; merging itself is in fp32.
        tolerance: largest difference of a logit between the adapter's model and the one written;
            `TOLERANCE[dtype]` if None.
        text: text to compare on; its first 2048 tokens are used.

    Returns:
        The certificate.

    Raises:
        UserError: not an adapter, one that cannot be merged, or a difference above the tolerance.
    """
    adapter, out = Path(adapter), Path(out)
    refuse_folder_in_use(out)
    if tolerance is not None and not tolerance >= 0:
        raise UserError(f"tolerance: {tolerance} must be 0 or more, a difference of logits")
    allowed = TOLERANCE[dtype] if tolerance is None else tolerance
    name, tokenizer, model = _load(adapter, base)
    windows = _windows(tokenizer, text)
    config = model.peft_config["default"].to_dict()
    certificate: dict[str, Any] = {
        "schema_version": 1,
        "base": name,
        "method": methods.method_of_config(config).name,
        "dtype": dtype,
        "tolerance": allowed,
        "text": {"tokens": sum(len(ids[0]) for ids in windows), "built_in": text == TEXT},
    }
    unmerged = _logits(model, windows)
    with adapters_off(model):
        certificate["base_to_adapted"] = asdict(compare_logits(_logits(model, windows), unmerged))
    certificate["scales"] = merge_weights(model)
    merged: Any = cast(Any, model).unload()
    certificate["head_tied"] = merged.lm_head.weight is merged.model.embed_tokens.weight
    if merged.config.tie_word_embeddings and not certificate["head_tied"]:
        raise UserError(f"{adapter}: merging untied the head from the embedding")
    in_float32 = allowed if dtype == "float32" else TOLERANCE["float32"]
    ours = _logits(merged, windows)
    certificate["merged_in_float32"] = _certify(ours, unmerged, in_float32, "merging in float32")
    with replaced_folder(out, must_be_new=True) as scratch:
        merged.to(DTYPES[dtype]).save_pretrained(str(scratch))
        tokenizer.save_pretrained(scratch)
        ours = _logits(load_model(str(scratch)), windows)
        certificate["written"] = _certify(ours, unmerged, allowed, f"writing {dtype}")
        certificate["versions"] = {package: version(package) for package in _PACKAGES}
        (scratch / CERTIFICATE).write_text(
            json.dumps(certificate, indent=2) + "\n", encoding="utf-8"
        )
        write_card(scratch, _describe(out, config, certificate), provenance_of(adapter))
    return certificate


def _describe(out: Path, config: dict[str, Any], certificate: dict[str, Any]) -> Weights:
    largest = certificate["written"]["largest"]
    return Weights(
        place=out,
        method=methods.method_of_config(config),
        base=certificate["base"],
        merged=f"in float32, written as {certificate['dtype']}; a logit differs from the unmerged"
        f" adapter's by at most {largest:.2g} ({CERTIFICATE})",
        has_patterns=has_patterns(config),
    )


def _load(adapter: Path, base: str | None) -> tuple[str, PreTrainedTokenizerBase, PeftModel]:
    """Return the base model's name, the tokenizer, and the model with its adapter not merged."""
    with as_folder(adapter) as folder:
        if not is_adapter(folder):
            raise UserError(
                f"{adapter} is a full model, so there is nothing to merge; use it as it is"
            )
        name = base_name(folder, base)
        model = load_tuned(folder, name)
        assert isinstance(model, PeftModel)
        return name, load_tokenizer(folder, name), model


@torch.no_grad()
def merge_weights(model: PeftModel) -> dict[str, float]:
    """Add every adapter's change to the weight below it; the adapters stay in place.

    Returns:
        The scale used, by module.

    Raises:
        UserError: an adapter on the embedding, which would change the tied head too.
    """
    config = model.peft_config["default"].to_dict()
    scales = {}
    for name, layer in lora_layers(model):
        scales[name] = methods.scale_of(config, name)
        weight: Any = layer.get_base_layer().weight
        weight.copy_(merged_weight(layer, scales[name]))
    return scales


def merged_weight(layer: LoraLayer, scale: float) -> Tensor:
    """Return the weight [out, in] that one adapted linear amounts to."""
    A, B = (side["default"].weight for side in (layer.lora_A, layer.lora_B))
    weight: Tensor = layer.get_base_layer().weight + scale * (B @ A)  # pyright: ignore[reportOperatorIssue]
    if "default" not in layer.lora_magnitude_vector:
        return weight
    magnitude: Any = layer.lora_magnitude_vector["default"].weight
    return magnitude[:, None] * weight / weight.norm(dim=1, keepdim=True)


def lora_layers(model: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    """Yield the adapted linears by name.

    Raises:
        UserError: an adapted embedding.
    """
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            if not isinstance(module.get_base_layer(), nn.Linear):
                raise UserError(
                    f"{name} has an adapter, which would change the tied head too; use the adapter"
                    " unmerged"
                )
            yield name, module


def compare_logits(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> LogitDifference:
    """Compare two lists of [T, V] logits."""
    pairs = list(zip(ours, theirs, strict=True))
    difference = [(a - b).abs() for a, b in pairs]
    agree = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in pairs])
    return LogitDifference(
        largest=max(d.max().item() for d in difference),
        mean=sum(d.sum().item() for d in difference) / sum(d.numel() for d in difference),
        argmax_agreement=agree.float().mean().item(),
    )


def _certify(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float, what: str
) -> dict[str, float]:
    difference = compare_logits(ours, theirs)
    if not difference.largest <= tolerance:  # NaN exceeds every tolerance
        raise UserError(
            f"{what} moves a logit by {difference.largest:.3g}, tolerance {tolerance:g}: nothing"
            " was written. Is the base model the one the adapter was trained on? A larger"
            " --tolerance accepts the difference"
        )
    return asdict(difference)


def _windows(tokenizer: PreTrainedTokenizerBase, text: str) -> list[Tensor]:
    """Return [1, T] ids, with T at most 512."""
    encoded: Any = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)
    ids = encoded["input_ids"][:, : _WINDOW * _WINDOWS].long()
    if ids.numel() == 0:
        raise UserError("the text to compare on is empty")
    return list(ids.split(_WINDOW, dim=1))


@torch.no_grad()
def _logits(model: nn.Module, windows: Sequence[Tensor]) -> list[Tensor]:
    """Return [T, V] logits per window, in fp32."""
    return [model(input_ids=ids).logits[0].float() for ids in windows]
