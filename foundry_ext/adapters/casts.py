"""Adapted linears without peft's own cast of their input.

peft casts a linear's input to the adapter's fp32, and autocast casts it back to bf16 for the
product. For o_proj and down_proj, whose input is bf16 already, that is two useless passes over the
input and two over its gradient. Without them every bit stays the same.
"""

from peft.tuners.lora import LoraLayer
from torch import nn


def leave_casts_to_autocast(model: nn.Module) -> None:
    """Turn off peft's input casts, in place.

    The adapters must be in fp32, and run under autocast or on fp32 inputs.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False
