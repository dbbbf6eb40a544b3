"""Conditions under which lora.py and dora.py take over an adapted linear's forward pass."""

from typing import Any

import torch
from torch import Tensor, nn


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a linear of `x` runs: autocast's if autocast is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def plain_adapter(module: Any, x: Tensor) -> str | None:
    """Return the adapter's name if the module is a frozen linear with one, all of it on this rank.

    Excluded are adapters that are off, merged or mixed; dropout, which changes the adapter's input;
    sharded weights, which FSDP gathers in the forward pass of the module that holds them; and fp16,
    in which products of gradients may underflow.

    Args:
        module: peft's adapted linear.
        x: its input [..., I].
    """
    adapters = module.active_adapters
    if module.disable_adapters or module.merged or len(adapters) != 1:
        return None
    adapter = adapters[0]
    if adapter not in module.lora_A:
        return None
    base: Any = module.base_layer
    factors = [module.lora_A[adapter].weight, module.lora_B[adapter].weight]
    if adapter in module.lora_magnitude_vector:
        factors.append(module.lora_magnitude_vector[adapter].weight)
    parameters = [base.weight, *factors]
    weight, (out_features, in_features), rank = base.weight, base.weight.shape, module.r[adapter]
    shapes = [(rank, in_features), (out_features, rank), (out_features,)]
    is_plain = (
        type(base) is nn.Linear
        and base.bias is None
        and not weight.requires_grad
        and not module.fan_in_fan_out
        and not module.lora_bias[adapter]
        and (isinstance(module.lora_dropout[adapter], nn.Identity) or not module.training)
        and all(type(p) in (nn.Parameter, Tensor) for p in parameters)
        and [tuple(p.shape) for p in factors] == shapes[: len(factors)]
        and x.shape[-1] == in_features
        and _has_plain_types(x, parameters)
    )
    return adapter if is_plain else None


def _has_plain_types(x: Tensor, parameters: list[Tensor]) -> bool:
    dtype = compute_dtype(x)
    if torch.is_autocast_enabled(x.device.type):
        return dtype == torch.bfloat16
    return dtype != torch.float16 and all(p.dtype == dtype for p in parameters)
