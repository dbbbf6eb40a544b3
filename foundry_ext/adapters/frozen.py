"""A frozen base in bf16, for training an adapter under amp_bf16.

A frozen fp32 weight takes 4 bytes instead of 2, and is cast in every forward and every backward
pass; with dropout, which is peft's own forward pass, autocast also keeps the copy in between.
Embedding, norms and head stay in fp32, because they read and write the fp32 residual stream. The
adapter stays in fp32 too.

LoRA's results are the same to the last bit. DoRA's are within bf16's rounding, because its row
norms and gain are computed from the bf16 weight.
"""

from typing import Any

import torch
from peft import PeftModel
from torch import nn

from foundry_ext.adapters import pissa
from foundry_ext.models.smollm2 import SmolLM2ForCausalLM
from foundry_ext.utils.errors import UserError

FROZEN_DTYPES = ("fp32", "bf16")


def check_frozen_dtype(frozen_dtype: str, *, adapted: bool, init_device: str) -> None:
    """Check `frozen_dtype` before a model is built.

    Raises:
        UserError: the value is unknown, or does not fit the model or `init_device`.
    """
    if frozen_dtype not in FROZEN_DTYPES:
        raise UserError(f"frozen_dtype: {frozen_dtype!r} must be one of {', '.join(FROZEN_DTYPES)}")
    if frozen_dtype == "fp32":
        return
    if not adapted:
        raise UserError(
            "frozen_dtype: bf16 needs an adapter, because without one no weight is frozen; leave it"
            " out, or add a peft_config"
        )
    if init_device != "cpu":
        raise UserError(
            f"frozen_dtype: bf16 does not work with init_device: {init_device}, because FSDP needs"
            " weights of one dtype; set frozen_dtype: fp32, or init_device: cpu and no fsdp_config"
        )


@torch.no_grad()
def hold_frozen_in_bf16(model: PeftModel) -> None:
    """Cast the frozen linears of the decoder layers to bf16, in place.

    Afterwards a forward pass without autocast to bf16 raises UserError.

    Raises:
        UserError: the adapter is PiSSA's.
    """
    if pissa.is_pissa(model):
        raise UserError(
            "frozen_dtype: bf16 does not work with init_lora_weights: pissa, because it would round"
            " the residual that PiSSA leaves in the base; set frozen_dtype: fp32"
        )
    inner = model.get_base_model()
    assert isinstance(inner, SmolLM2ForCausalLM)
    for module in inner.model.layers.modules():
        if isinstance(module, nn.Linear):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.bfloat16)
    # Not on `inner`: peft calls inner.forward directly, which skips inner's hooks.
    inner.model.register_forward_pre_hook(_check_autocast)


def _check_autocast(module: nn.Module, _args: Any) -> None:
    device = next(module.parameters()).device.type
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16:
        return
    raise UserError(
        "frozen_dtype: bf16 needs precision: amp_bf16, whose results it does not change; set that,"
        " or frozen_dtype: fp32"
    )
