"""A run's model before it is built: parameters, activations per layer, and throughput here.

The complete model exists on the meta device only, without weights. Timings use one to three
layers at full width, whose weights are uninitialised memory.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers.models.llama import LlamaConfig

from foundry_ext.adapters import methods
from foundry_ext.adapters.fast import use_fast_linears
from foundry_ext.adapters.frozen import check_frozen_dtype, hold_frozen_in_bf16
from foundry_ext.checkpoints.export import adaptable_modules
from foundry_ext.models.activations import autocast
from foundry_ext.models.flops import adapter_parameters, forward_flops, training_flops
from foundry_ext.models.memory import Parameters, optimizer_states
from foundry_ext.models.smollm2 import SmolLM2ForCausalLM
from foundry_ext.training.meter import StepCounts
from foundry_ext.training.model_building import read_config
from foundry_ext.utils.constants import IGNORE_INDEX
from foundry_ext.utils.errors import UserError, naming

# Budget of the timing below, in FLOPs of forward and backward passes.
_TIMING_FLOPS = 1.5e11
_REPEATS = 3
_OPTIMIZER_ELEMENTS = 2**22


@dataclass(frozen=True, kw_only=True)
class PlannedModel:
    """The `model` section of a resolved configuration."""

    config: LlamaConfig
    peft_config: dict[str, Any] | None
    frozen_dtype: str
    name: str

    @classmethod
    def of(cls, model: Mapping[str, Any]) -> "PlannedModel":
        """Read the shape, from the hub if necessary, and check the adapter.

        Raises:
            UserError: a model other than smollm2_packed, or an adapter that does not fit.
        """
        if model.get("name") != "smollm2_packed":
            raise UserError(
                f"model.name: {model.get('name')!r} cannot be planned; only smollm2_packed can"
            )
        name = model["pretrained_model_name_or_path"]
        config = read_config(
            name,
            dict(model.get("config_overrides") or {}),
            use_auth_token=bool(model.get("use_auth_token")),
        )
        peft_config = model.get("peft_config")
        stored = model.get("pretrained_lora_id_or_path")
        if stored is not None:
            with naming(f"model.pretrained_lora_id_or_path, {stored!r}"):
                peft_config = PeftConfig.from_pretrained(stored).to_dict()
        frozen_dtype = model.get("frozen_dtype", "fp32")
        check_frozen_dtype(frozen_dtype, adapted=peft_config is not None, init_device="cpu")
        if peft_config is not None:
            peft_config = methods.with_defaults(peft_config)
        planned = cls(
            config=config, peft_config=peft_config, frozen_dtype=frozen_dtype, name=str(name)
        )
        if peft_config is not None:
            methods.check(peft_config, adaptable_modules(planned.without_weights(adapted=False)))
        return planned

    def without_weights(self, *, adapted: bool = True, **shape: int) -> nn.Module:
        """Return the model on the meta device; `shape` overrides the configuration."""
        config = LlamaConfig(**{**self.config.to_dict(), **shape})
        with torch.device("meta"):
            model = SmolLM2ForCausalLM(config)
            if not adapted or self.peft_config is None:
                return model
            # Initial values do not change an adapter's size, and PiSSA's would need the weights.
            settings = {**self.peft_config, "init_lora_weights": True, "inference_mode": False}
            wrapped = get_peft_model(model, LoraConfig(**settings))
        if self.frozen_dtype == "bf16":
            hold_frozen_in_bf16(wrapped)  # pyright: ignore[reportArgumentType]
        use_fast_linears(wrapped)  # pyright: ignore[reportArgumentType]
        return wrapped

    def build(self, num_layers: int, *, vocab_size: int = 8, device: str = "cpu") -> nn.Module:
        """Return `num_layers` layers at full width, with arbitrary weights."""
        model = self.without_weights(num_hidden_layers=num_layers, vocab_size=vocab_size)
        model = model.to_empty(device=device)
        for inner in model.modules():
            if isinstance(inner, SmolLM2ForCausalLM):
                inner.tie_weights()  # to_empty has untied them
        return model

    @property
    def parameters(self) -> Parameters:
        return Parameters.of(self.without_weights())

    def training_flops(self, counts: StepCounts) -> float:
        return training_flops(
            self.config,
            num_tokens=counts.real_tokens,
            num_loss_tokens=counts.loss_tokens,
            sum_squared_lengths=counts.sum_squared_lengths,
            frozen_base=self.peft_config is not None,
            adapter_parameters=adapter_parameters(self.without_weights()),
        )

    def evaluation_flops(
        self,
        num_tokens: int,
        num_head_rows: int,
        sum_squared_lengths: int,
        *,
        adapted: bool = True,
    ) -> float:
        """Return the FLOPs of a forward pass, of the base model unless it is `adapted`."""
        parts = forward_flops(
            self.config,
            num_tokens=num_tokens,
            num_loss_tokens=num_head_rows,
            sum_squared_lengths=sum_squared_lengths,
        )
        adapter = adapter_parameters(self.without_weights()) if adapted else 0
        return sum(parts.values()) + 2.0 * adapter * num_tokens


@dataclass(frozen=True, kw_only=True)
class MeasuredThroughput:
    """Training throughput of this device, extrapolated from timings of a few layers."""

    seconds_per_token: float
    seconds_per_step: float
    """Seconds of the optimizer's update, independent of the tokens."""
    num_tokens: int
    """Tokens that were timed."""


def measure_throughput(
    model: PlannedModel,
    lengths: Sequence[int],
    *,
    precision: str,
    optimizer: str,
    loss_share: float,
    recomputes: bool,
    device: str = "cpu",
) -> MeasuredThroughput:
    """Time forward and backward passes of one layer, of three, and of one with the head.

    `lengths` are those of the run's documents; the first are used, as many as the time allows.
    `loss_share` is the share of tokens that carry loss. Recomputing checkpointed activations
    (`recomputes`) costs another forward pass.
    """
    vocabulary = model.config.vocab_size
    chosen = _affordable(model, lengths)
    one, three, headed = (
        _seconds(model.build(layers, vocab_size=size, device=device), chosen, precision, loss_share)
        for layers, size in ((1, 8), (3, 8), (1, vocabulary))
    )
    layer, head = max(three - one, 0.0) / 2, max(headed - one, 0.0)
    rest = max(one - layer, 0.0)
    again = 4 / 3 if recomputes else 1.0
    num_tokens = sum(chosen)
    total = model.config.num_hidden_layers * layer * again + head + rest
    return MeasuredThroughput(
        seconds_per_token=total / num_tokens,
        seconds_per_step=model.parameters.trainable * _update_seconds(optimizer, device),
        num_tokens=num_tokens,
    )


def _affordable(model: PlannedModel, lengths: Sequence[int]) -> list[int]:
    """Return the first lengths, the last one truncated, within _TIMING_FLOPS."""
    shape = LlamaConfig(**{**model.config.to_dict(), "num_hidden_layers": 5})
    parts = forward_flops(shape, num_tokens=1, num_loss_tokens=1, sum_squared_lengths=1)
    left = max(64, int(_TIMING_FLOPS / (3 * sum(parts.values()) * (_REPEATS + 1))))
    chosen: list[int] = []
    for length in lengths:
        if left < 2:
            break
        chosen.append(min(int(length), left))
        left -= chosen[-1]
    return chosen


def _seconds(model: nn.Module, lengths: list[int], precision: str, loss_share: float) -> float:
    """Return the fastest of a few forward and backward passes, after a warm-up."""
    device = next(model.parameters()).device
    model.train()
    with torch.no_grad():
        for parameter in model.parameters():  # uninitialised memory may hold NaN, which is slower
            parameter.zero_()
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    ids = torch.zeros_like(positions)
    unlabelled = (positions == 0) | (torch.arange(ids.shape[1]) >= loss_share * ids.shape[1])
    labels = ids.masked_fill(unlabelled, IGNORE_INDEX)
    tensors = {"input_ids": ids, "position_ids": positions, "labels": labels, "cu_seqlens": ends}
    batch: dict[str, Any] = {name: tensor.to(device) for name, tensor in tensors.items()}
    batch |= {"max_seqlen": max(lengths), "num_loss_tokens": int((~unlabelled).sum())}

    def step() -> None:
        with autocast(precision, device.type):
            loss = model(**batch).loss
        loss.backward()
        model.zero_grad()

    return _fastest(step, device.type)


def _update_seconds(optimizer: str, device: str) -> float:
    """Time one parameter's update by Lion; Adam is assumed to take 1.5 times as long."""
    weight, gradient, moment = (torch.zeros(_OPTIMIZER_ELEMENTS, device=device) for _ in range(3))

    def step() -> None:
        weight.add_(moment.lerp(gradient, 0.1).sign_(), alpha=-1e-4)
        moment.lerp_(gradient, 0.05)

    cost = 1.5 if optimizer_states(optimizer) == 2 else 1.0
    return cost * _fastest(step, device) / _OPTIMIZER_ELEMENTS


def _fastest(step: Callable[[], None], device: str) -> float:
    times = []
    for _ in range(_REPEATS + 1):
        started = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:])
