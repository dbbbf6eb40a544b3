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
    """Return the base model under an adapter; it shares the adapted model's memory."""

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
            # peft sets requires_grad again, by its own rules.
            for parameter, is_trained in zip(parameters, trainable, strict=True):
                parameter.requires_grad_(is_trained)

    return base


class BaseCopy:
    """A frozen copy of the model, for full fine-tuning; doubles the memory of the weights.

    Like every base model it is called to be used: `with base() as model`.
    """

    def __init__(self, model: SmolLM2ForCausalLM):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    def __call__(self) -> nullcontext[SmolLM2ForCausalLM]:
        return nullcontext(self.model)

    def compute_as(self, model: SmolLM2ForCausalLM) -> None:
        """Use the kernels that `model` uses now, so that equal weights give equal values."""
        self.model.attention_backend = model.attention_backend
        self.model.model.evaluation_pieces = model.model.evaluation_pieces

    def retake(self, model: SmolLM2ForCausalLM) -> None:
        """Copy the weights that `model` has now."""
        self.model.load_state_dict(model.state_dict(), strict=True)


@torch.no_grad()
def weights_fingerprint(model: SmolLM2ForCausalLM) -> str:
    """Return a digest that tells base models apart: 16 hex digits.

    It covers about 64 elements of every weight without an adapter. Weights under an adapter are
    left out because PiSSA changes them, with rounding that differs between machines.
    """
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        if "lora_" in name or ".base_layer." in name:
            continue
        elements = weight.flatten()
        sample = elements[:: max(1, len(elements) // 64)].float().cpu()
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]
