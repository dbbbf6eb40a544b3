"""The models that a parity compares: ours, theirs, and theirs in fp64."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.models.llama import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from foundry_ext.models.pretrained import HUB_NAMES, shipped_config
from foundry_ext.models.smollm2 import SmolLM2ForCausalLM
from foundry_ext.utils.errors import UserError

SIZES = tuple(name.removeprefix("smollm2-") for name in HUB_NAMES)


@dataclass(frozen=True)
class Pair:
    """This package's model and transformers', in one dtype.

    Both are put into evaluation mode, and their weights get no gradients.
    """

    ours: SmolLM2ForCausalLM
    theirs: LlamaForCausalLM

    def __post_init__(self) -> None:
        for model in (self.ours, self.theirs):
            model.eval().requires_grad_(False)


def load_pair(model: str) -> Pair:
    """Return the pair of a size with random weights, or of a model on the disk, in fp32.

    Args:
        model: 135m, 360m or 1.7b; or a Hugging Face folder, or a Composer checkpoint of a model.

    Raises:
        UserError: it is none of these, an adapter, or a model of another shape.
    """
    size = model.lower().removeprefix("smollm2-")
    if size in SIZES:
        config: Any = LlamaConfig.from_pretrained(str(shipped_config(f"smollm2-{size}")))
        return random_pair(config)
    path = Path(model)
    if not path.exists():
        raise UserError(
            f"MODEL: {model!r} is neither a folder or checkpoint nor a size; the sizes, with random"
            f" weights, are {', '.join(SIZES)}"
        )
    from foundry_ext.checkpoints.loading import as_folder, is_adapter, load_model  # slow

    with as_folder(path) as folder:
        if is_adapter(folder):
            raise UserError(
                f"MODEL: {model} is an adapter; merge it first: foundry-ext merge {model} OUT"
            )
        advice = {"way_out": "name another MODEL"}
        ours = load_model(str(folder), SmolLM2ForCausalLM, **advice)
        return _sharing(ours, load_model(str(folder), LlamaForCausalLM, **advice))


def random_pair(config: LlamaConfig) -> Pair:
    """Return a pair with equal random weights, the same in every call.

    Weights are as in a trained model rather than a new one: with SmolLM2's own small start,
    attention is nearly uniform and hides errors of rope and masks; and norm weights of one hide
    whether a norm uses them.
    """
    config = copy.deepcopy(config)
    config.initializer_range = 1.7 * config.hidden_size**-0.5
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ours = SmolLM2ForCausalLM(copy.deepcopy(config))
        with torch.no_grad():
            for name, parameter in ours.named_parameters():
                if name.endswith("norm.weight"):
                    parameter.uniform_(0.5, 1.5)
        theirs = LlamaForCausalLM(config)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return _sharing(ours, theirs)


def _sharing(ours: SmolLM2ForCausalLM, theirs: LlamaForCausalLM) -> Pair:
    """Return the pair, with one memory for parameters that are equal, as all should be."""
    our_parameters = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        if name in our_parameters and torch.equal(parameter, our_parameters[name]):
            parameter.data = our_parameters[name].data
    return Pair(ours, theirs)


def in_dtype(pair: Pair, dtype: torch.dtype, device: str) -> Pair:
    """Return the pair with its weights cast; itself if that changes nothing."""
    weight = pair.ours.lm_head.weight
    if (weight.dtype, weight.device.type) == (dtype, device):
        return pair
    return _sharing(*(_cast(model, dtype, device) for model in (pair.ours, pair.theirs)))


def in_wider_dtype(theirs: LlamaForCausalLM) -> LlamaForCausalLM:
    """Return theirs with the same weights in a dtype whose rounding is negligible beside its own.

    That is fp64 for fp32, and fp32 for bf16 and fp16. transformers' norm casts to fp32 whatever its
    input, so torch's own takes its place. Angles stay those of fp32, which is how transformers
    defines them.
    """
    exact = _cast(theirs, _WIDER[theirs.dtype], theirs.device.type)
    for module in list(exact.modules()):
        for name, child in module.named_children():
            if isinstance(child, LlamaRMSNorm):
                norm = nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon, device="meta")
                norm.weight = child.weight
                setattr(module, name, norm)
    return exact


_WIDER = {
    torch.float32: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}


def _cast(model: Any, dtype: torch.dtype, device: str) -> Any:
    """Return a copy of a model in another dtype.

    `to` also rounds the frequencies of transformers' rotary embedding, which loading a model in
    that dtype does not do. They are put back.
    """
    cast = copy.deepcopy(model).to(device, dtype)
    for name, buffer in model.named_buffers():
        cast.get_buffer(name).data = buffer.to(device)
    return cast
