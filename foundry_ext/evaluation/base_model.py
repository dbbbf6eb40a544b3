"""The base model of a run: its adapters switched off, or a copy made before training."""

import copy
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from peft import PeftModel

from foundry_ext.adapters import pissa
from foundry_ext.models.scores import BaseModel
from foundry_ext.models.smollm2 import SmolLM2ForCausalLM


def adapters_off(model: PeftModel) -> BaseModel:
    """The base model under an adapter, whose memory it shares."""

    @contextmanager
    def base() -> Iterator[SmolLM2ForCausalLM]:
        parameters = list(model.parameters())
        trainable = [parameter.requires_grad for parameter in parameters]
        try:
            with pissa.adapters_off(model):  # PiSSA has changed the weights below it
                inner = model.get_base_model()
                assert isinstance(inner, SmolLM2ForCausalLM)
                yield inner
        finally:
            # peft sets it anew, by rules of its own.
            for parameter, needed in zip(parameters, trainable, strict=True):
                parameter.requires_grad_(needed)

    return base


class BaseCopy:
    """A frozen copy, for full fine-tuning: as much memory again as the weights take.

    Calling it makes the copy usable for the length of a `with`, like every base model.
    """

    def __init__(self, model: SmolLM2ForCausalLM):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    def __call__(self) -> nullcontext[SmolLM2ForCausalLM]:
        return nullcontext(self.model)

    def retake(self, model: SmolLM2ForCausalLM) -> None:
        """The weights of `model` as they are now."""
        self.model.load_state_dict(model.state_dict(), strict=True)


@torch.no_grad()
def weights_fingerprint(model: SmolLM2ForCausalLM) -> str:
    """Of some elements of every weight that no adapter is on: enough to tell base models apart.

    Those under an adapter are left out, for PiSSA changes them, to the last bit only on one
    machine.
    """
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        if "lora_" in name or ".base_layer." in name:
            continue
        elements = weight.flatten()
        chosen = elements[:: max(1, len(elements) // 64)].float().cpu()
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(chosen.numpy().tobytes())
    return digest.hexdigest()[:16]
