"""PiSSA (arXiv 2404.02948): an adapter that starts as a weight's r largest singular directions.

The base weight W becomes the residual W - scale * B0 @ A0. No adapter checkpoint holds it, and a
user of the trained adapter does not have it. The initial factors A0 [r, in] and B0 [out, r]
therefore stay with the model as buffers and go into its checkpoints. They give exactly:

- the residual, even on another machine, whose SVD may rotate the vectors;
- an ordinary LoRA of rank 2r on W, A' = [A; A0] and B' = [B, -B0], because the change of W is
  scale * (B @ A - B0 @ A0);
- the base model, by using A0 and B0 in place of A and B.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeGuard, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from foundry_ext.utils.errors import UserError

ADAPTER = "default"
_BUFFERS = "lora_initial"  # "lora_" and the adapter's name let Composer's filter keep them


class InitialFactors(nn.Module):
    """Initial factors of one linear: A [r, in] and B [out, r]."""

    A: Tensor
    B: Tensor

    def __init__(self, A: Tensor, B: Tensor):
        super().__init__()
        self.register_buffer("A", A.detach().clone())
        self.register_buffer("B", B.detach().clone())


def is_pissa(model: nn.Module) -> TypeGuard[PeftModel]:
    """Return whether the model has an adapter initialised by PiSSA."""
    if not isinstance(model, PeftModel):
        return False
    config = model.peft_config[ADAPTER]
    return isinstance(config, LoraConfig) and config.init_lora_weights == "pissa"


def remember_initial_factors(model: PeftModel) -> None:
    """Keep the factors of a freshly initialised PiSSA adapter as buffers beside it.

    Raises:
        UserError: the rank exceeds the number of singular values, or the weights are on the meta
            device.
    """
    for name, layer in _layers(model):
        A, B = _factors(layer)
        rank = layer.r[ADAPTER]
        if A.is_meta:
            raise UserError("init_lora_weights: 'pissa' needs the weights; set init_device: cpu")
        if A.shape[0] != rank:
            raise UserError(
                f"peft_config.r: {rank} exceeds the {A.shape[0]} singular values of {name}; PiSSA"
                " needs a smaller rank"
            )
        _keep(layer, A, B)


def empty_initial_factors(model: PeftModel) -> None:
    """Create buffers to load a checkpoint's factors into, without decomposing the weights."""
    for _, layer in _layers(model):
        A, B = (torch.zeros_like(x) for x in _factors(layer))
        _keep(layer, A, B)


def copy_initial_factors(model: PeftModel) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (A0, B0) of every adapted module, before a checkpoint is loaded over them."""
    return {name: (initial.A.clone(), initial.B.clone()) for name, _, initial in _remembered(model)}


@torch.no_grad()
def correct_residuals(model: PeftModel, before: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Correct the residuals of modules whose loaded factors differ from those `before` loading.

    On the machine that trained they are equal, bit for bit, and nothing changes.

    Raises:
        UserError: they differ, and the weights are sharded already.
    """
    for name, layer, initial in _remembered(model):
        A, B = before[name]
        if torch.equal(A, initial.A) and torch.equal(B, initial.B):
            continue
        weight = layer.get_base_layer().weight
        if type(weight) is not nn.Parameter or weight.shape != (B.shape[0], A.shape[1]):
            raise UserError(
                "init_lora_weights: 'pissa' was decomposed differently on the machine that saved"
                " this checkpoint; resume there, or resume without FSDP"
            )
        weight += layer.scaling[ADAPTER] * (B @ A - initial.B @ initial.A)


@contextmanager
def as_plain_lora(model: nn.Module, weights: dict[str, Any] | None) -> Iterator[dict | None]:
    """Present a PiSSA adapter as the equivalent LoRA within the context.

    Its configuration then has doubled ranks on the original base model, and alphas that keep the
    scale.

    Args:
        model: any model; without PiSSA nothing happens.
        weights: its state dict, or None to use the model's own.

    Yields:
        The weights to save with that configuration.
    """
    if not is_pissa(model):
        yield weights
        return
    config = model.peft_config[ADAPTER]
    assert isinstance(config, LoraConfig)
    try:
        model.peft_config[ADAPTER] = _plain_config(config)
        yield _joined_factors(model.state_dict() if weights is None else weights)
    finally:
        model.peft_config[ADAPTER] = config


def _plain_config(config: LoraConfig) -> LoraConfig:
    factor = 2**0.5 if config.use_rslora else 2  # alpha/sqrt(r), or alpha/r
    changes = {
        "init_lora_weights": True,
        "r": 2 * config.r,
        "lora_alpha": factor * config.lora_alpha,
        "rank_pattern": {k: 2 * rank for k, rank in (config.rank_pattern or {}).items()},
        "alpha_pattern": {k: factor * alpha for k, alpha in (config.alpha_pattern or {}).items()},
    }
    return LoraConfig(**config.to_dict() | changes)


def _joined_factors(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Return the weights with A' = [A; A0] and B' = [B, -B0] in place of A and B."""
    joined = {}
    for name, weight in weights.items():
        if f".{_BUFFERS}.{ADAPTER}." in name:
            continue
        for side, dim, sign in (("A", 0, 1), ("B", 1, -1)):
            module, is_factor, _ = name.partition(f".lora_{side}.{ADAPTER}.weight")
            if is_factor:
                initial = weights[f"{module}.{_BUFFERS}.{ADAPTER}.{side}"]
                weight = torch.cat([weight, sign * initial], dim=dim)
        joined[name] = weight
    return joined


@contextmanager
def adapters_off(model: PeftModel) -> Iterator[None]:
    """Turn the model into its base model within the context.

    With PiSSA, `disable_adapter` alone would leave the residual.
    """
    if not is_pissa(model):
        with model.disable_adapter():
            yield
        return
    factors = [
        (parameter, parameter.data, start)
        for _, layer, initial in _remembered(model)
        for parameter, start in zip(_factors(layer), (initial.A, initial.B), strict=True)
    ]
    try:
        for parameter, _, start in factors:
            parameter.data = start
        # Autocast caches casts by a parameter's identity, and would keep using the other factors.
        torch.clear_autocast_cache()
        yield
    finally:
        for parameter, trained, _ in factors:
            parameter.data = trained
        torch.clear_autocast_cache()


def _layers(model: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def _remembered(model: PeftModel) -> Iterator[tuple[str, LoraLayer, InitialFactors]]:
    for name, layer in _layers(model):
        yield name, layer, getattr(layer, _BUFFERS)[ADAPTER]


def _keep(layer: LoraLayer, A: Tensor, B: Tensor) -> None:
    cast(nn.Module, layer).add_module(_BUFFERS, nn.ModuleDict({ADAPTER: InitialFactors(A, B)}))


def _factors(layer: LoraLayer) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight  # pyright: ignore[reportReturnType]
