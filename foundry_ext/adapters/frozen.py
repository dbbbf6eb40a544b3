"""The frozen base held in bf16, for training an adapter under amp_bf16.

Autocast casts a frozen fp32 weight in every forward pass and keeps that copy for the backward pass:
6 bytes a weight where 2 do. Embedding, norms and head, which read and write the fp32 residual
stream, stay as they are, and so does the adapter.

LoRA's results are the same to the last bit. DoRA's are within bf16's rounding, for its row norms
and its gain are taken of the weight that is held.
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
    """Raises ValueError for what no model can have, before one is built."""
    if frozen_dtype not in FROZEN_DTYPES:
        raise UserError(f"frozen_dtype: {frozen_dtype!r}; choose {' or '.join(FROZEN_DTYPES)}")
    if frozen_dtype == "fp32":
        return
    if not adapted:
        raise UserError(
            "frozen_dtype: bf16 is for adapters, and without one no weight is frozen; leave it out,"
            " or give a peft_config"
        )
    if init_device != "cpu":
        raise UserError(
            f"frozen_dtype: bf16 with init_device: {init_device}: FSDP takes weights of one type"
            " only; set frozen_dtype: fp32, or init_device: cpu and no fsdp_config"
        )


@torch.no_grad()
def hold_frozen_in_bf16(model: PeftModel) -> None:
    """Casts the frozen linears of the decoder layers; in place.

    Raises:
        UserError: a PiSSA adapter; later, in a forward pass without autocast to bf16.
    """
    if pissa.is_pissa(model):
        raise UserError(
            "frozen_dtype: bf16 would round away part of the residual that init_lora_weights:"
            " pissa leaves in the base; set frozen_dtype: fp32"
        )
    inner = model.get_base_model()
    assert isinstance(inner, SmolLM2ForCausalLM)
    for module in inner.model.layers.modules():
        if isinstance(module, nn.Linear):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.bfloat16)
    inner.model.register_forward_pre_hook(
        _check_autocast
    )  # peft calls inner.forward past its hooks


def _check_autocast(module: nn.Module, _args: Any) -> None:
    device = next(module.parameters()).device.type
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16:
        return
    raise UserError(
        "frozen_dtype: bf16 is for precision: amp_bf16, whose results it leaves as they are; set"
        " that, or frozen_dtype: fp32"
    )
