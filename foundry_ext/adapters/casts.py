"""Adapted linears without peft's own cast of their input.

peft casts a linear's input to the adapter's fp32, and autocast casts it back to bf16 for the
product: two passes over the input of o_proj and down_proj, which is bf16 already, and two over its
gradient. Without them every bit stays the same.
"""

from peft.tuners.lora import LoraLayer
from torch import nn


def leave_casts_to_autocast(model: nn.Module) -> None:
    """For adapters in fp32 that run under autocast, or on fp32 inputs; in place."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False
