"""Replace the forward passes of peft's adapted linears by faster ones of the same result."""

from peft.tuners.lora import layer as peft_layer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn

from foundry_ext.adapters.dora import FastDoraLinear
from foundry_ext.adapters.lora import FastLoraLinear


def use_fast_linears(model: nn.Module) -> None:
    """Give every linear with an adapter of LoRA or DoRA its fast forward pass, in place.

    Adapted embeddings and other variants do not change. Call it again after adding an adapter.
    """
    for module in model.modules():
        if type(module) not in (peft_layer.Linear, FastLoraLinear):
            continue
        variants = {type(variant) for variant in module.lora_variant.values()}  # pyright: ignore
        if DoraLinearVariant in variants:
            module.__class__ = FastDoraLinear
        elif not variants:
            module.__class__ = FastLoraLinear
