"""The systems compared, each as a callable that takes one optimizer step.

All variants of a comparison share one set of parameters and one optimizer. The model is therefore
in memory once, and the losses can be compared at any time.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.workloads import (
    Batch,
    Workload,
    flattened_batches,
    num_computed_tokens,
    packed_batches,
    padded_batches,
)
from foundry_ext.models.smollm2 import SmolLM2ForCausalLM

CONFIGS = Path(__file__).parents[1] / "foundry_ext" / "models" / "configs"
METHODS: dict[str, dict[str, Any] | None] = {
    "full": None,
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
}
RANK = 16
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to compute a step."""

    title: str
    ours: bool
    batches: str
    """padded, flattened (transformers' padding-free arguments) or packed."""
    attention: str = "sdpa"
    """Attention implementation of transformers; ours uses the setup's backend."""
    compiled: bool = False
    mask: bool = True
    """A padded batch has a mask, as a tokenizer's output does. Padding on the right needs none with
    causal attention, and SDPA has a faster kernel without one."""


VARIANTS = {
    "hf_padded": Variant(title="HF padded, SDPA", ours=False, batches="padded"),
    "hf_padded_no_mask": Variant(
        title="HF padded, SDPA, no mask", ours=False, batches="padded", mask=False
    ),
    "hf_padded_compiled": Variant(
        title="HF padded, SDPA, compiled", ours=False, batches="padded", compiled=True
    ),
    "hf_padding_free": Variant(
        title="HF padding-free, flash",
        ours=False,
        batches="flattened",
        attention="flash_attention_2",
    ),
    "unpadded": Variant(title="unpadded", ours=True, batches="padded"),
    "unpadded_larger": Variant(title="unpadded, larger microbatch", ours=True, batches="padded"),
    "ours_eager": Variant(title="ours, eager", ours=True, batches="packed"),
    "ours": Variant(title="ours, as shipped", ours=True, batches="packed", compiled=True),
}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Settings that all variants of a comparison share, and those of `ours` as shipped."""

    model: str = "smollm2-135m"
    config_overrides: dict[str, Any] = field(default_factory=dict)
    method: str = "full"
    precision: str = "bf16"
    """bf16: parameters and everything else; amp_bf16: fp32 parameters under autocast; fp32."""
    device: str = "cpu"
    backend: str = "auto"
    loss: str = "chunked"
    compile: str = "none"
    """Part of `ours` that is compiled, with packs of one shape: none, layers or model."""
    compile_mode: str = "default"
    dynamic: bool = False
    activation_checkpointing: bool = False
    frozen_dtype: str = "fp32"
    """dtype of an adapter's frozen linears on both sides; bf16 only under amp_bf16."""
    learning_rate: float = 0.0
    """Learning rate of AdamW. 0 does all the work but keeps the weights, so losses compare."""
    seed: int = 0
    """Seed of the random weights."""

    def config(self) -> LlamaConfig:
        return AutoConfig.from_pretrained(
            CONFIGS / self.model, trust_remote_code=False, use_cache=False, **self.config_overrides
        )


class Step:
    """One optimizer step: forward and backward of every microbatch, AdamW, zero_grad.

    There is no gradient clipping and no scheduler. The loss is not fetched, so that a timed step
    never waits for the device. Each microbatch's mean loss is weighted by its share of the labels.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: Sequence[Batch],
        setup: Setup,
    ):
        self.model, self.optimizer, self.setup = model, optimizer, setup
        self.num_computed_tokens = num_computed_tokens(batches)
        self.weights = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]  # pyright: ignore
        self.num_loss_tokens = sum(self.weights)
        self.load(batches)

    def __call__(self) -> torch.Tensor:
        """Take the step; return mean nats over its labels, a scalar still on the device."""
        amp = self.setup.precision == "amp_bf16"
        total = torch.zeros((), device=self.setup.device)
        for batch, weight in zip(self.batches, self.weights, strict=True):
            with torch.autocast(self.setup.device, torch.bfloat16, enabled=amp):
                loss = self.model(**batch).loss * (weight / self.num_loss_tokens)
            loss.backward()
            total += loss.detach()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def load(self, batches: Sequence[Batch]) -> None:
        """Replace the batches by others that the loader made from the same documents."""
        self.batches = [to_device(batch, self.setup.device) for batch in batches]


def make_batches(
    name: str, workload: Workload, setup: Setup, rows: int | None = None
) -> list[Batch]:
    """Return a step's microbatches for a variant, on the CPU; `rows` as in `Bench.step`."""
    variant = VARIANTS[name]
    if variant.batches == "flattened":
        return flattened_batches(workload)
    if variant.batches == "packed":
        return packed_batches(workload, fixed_shape=is_compiled(variant, setup))
    batches = padded_batches(workload, rows or workload.microbatches[-1])
    if variant.mask:
        return batches
    return [{k: v for k, v in batch.items() if k != "attention_mask"} for batch in batches]


def is_compiled(variant: Variant, setup: Setup) -> bool:
    return variant.compiled and (not variant.ours or setup.compile != "none")


def to_device(batch: Batch, device: str) -> Batch:
    move = {"device": device, "non_blocking": True}
    return {k: v.to(**move) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


class Bench:
    """Factory of the steps of one setup, with shared weights."""

    def __init__(self, setup: Setup):
        self.setup = setup
        torch.manual_seed(setup.seed)
        self.source = self._new_model(ours=True)
        if setup.frozen_dtype == "bf16" and setup.method != "full":
            from foundry_ext.adapters.frozen import hold_frozen_in_bf16

            hold_frozen_in_bf16(self.source)  # pyright: ignore[reportArgumentType]
        trained = [p for p in self.source.parameters() if p.requires_grad]
        # Fused on both sides, because it is torch's fastest.
        self.optimizer = torch.optim.AdamW(trained, lr=setup.learning_rate, fused=True)
        self._models: dict[tuple[bool, str, bool], nn.Module] = {}

    def step(self, name: str, workload: Workload, rows: int | None = None) -> Step:
        """Return a variant's step; `rows` of a padded microbatch, by default the workload's most.

        Raises:
            Absent: the variant cannot run here.
        """
        variant = VARIANTS[name]
        problem = why_absent(variant, self.setup)
        if problem:
            raise Absent(problem)
        batches = make_batches(name, workload, self.setup, rows)
        return Step(self._model(variant), self.optimizer, batches, self.setup)

    def _model(self, variant: Variant) -> nn.Module:
        compiled = is_compiled(variant, self.setup)
        key = (variant.ours, variant.attention, compiled)
        if key not in self._models:
            model = self._new_model(ours=variant.ours, attention=variant.attention)
            share_parameters(self.source, model)
            model.to(self.setup.device)  # buffers
            if compiled:
                model = self._compile(model, variant)
            self._models[key] = model
        return self._models[key]

    def _compile(self, model: nn.Module, variant: Variant) -> nn.Module:
        setup = self.setup
        if not variant.ours:
            # Rows have many lengths, and each would compile again without `dynamic`.
            return torch.compile(model, dynamic=True)  # pyright: ignore[reportReturnType]
        from foundry_ext.models.compiled import compile_model

        compile_model(
            inner(model), scope=setup.compile, mode=setup.compile_mode, dynamic=setup.dynamic
        )
        return model

    def _new_model(self, *, ours: bool, attention: str = "sdpa") -> nn.Module:
        setup, config = self.setup, self.setup.config()
        if ours:
            model = SmolLM2ForCausalLM(config)
            model.attention_backend, model.loss_implementation = setup.backend, setup.loss
        else:
            model = LlamaForCausalLM._from_config(config, attn_implementation=attention)
        model = model.to(dtype=torch.bfloat16 if setup.precision == "bf16" else torch.float32)  # pyright: ignore
        if setup.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if METHODS[setup.method] is not None:
            model = with_adapter(model, setup.method, ours=ours)
        return model.to(setup.device).train()


def with_adapter(model: Any, method: str, *, ours: bool) -> nn.Module:
    """Add peft's adapter to all seven linears, in the model's dtype; ours gets our fast DoRA."""
    from peft import LoraConfig, get_peft_model

    options = METHODS[method] or {}
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=LINEARS, task_type="CAUSAL_LM", **options
    )
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    if ours:
        from foundry_ext.adapters.casts import leave_casts_to_autocast
        from foundry_ext.adapters.fast import use_fast_linears

        use_fast_linears(adapted)
        leave_casts_to_autocast(adapted)
    return adapted


def inner(model: nn.Module) -> Any:
    """Return the decoder below an adapter."""
    get_base: Callable[[], nn.Module] | None = getattr(model, "get_base_model", None)
    return get_base() if get_base else model


def share_parameters(source: nn.Module, target: nn.Module) -> None:
    """Put the parameters of `source` into `target`, which has the same names."""
    named = dict(source.named_parameters(remove_duplicate=False))
    wanted = [name for name, _ in target.named_parameters(remove_duplicate=False)]
    assert set(wanted) == set(named), set(wanted) ^ set(named)
    for name in wanted:
        module, _, leaf = name.rpartition(".")
        target.get_submodule(module)._parameters[leaf] = named[name]


class Absent(Exception):
    """A variant cannot run here; the message says why."""


def why_absent(variant: Variant, setup: Setup) -> str:
    """Return why a variant cannot run here, or an empty string if it can."""
    if variant.attention == "flash_attention_2":
        if setup.device != "cuda":
            return "needs a GPU"
        if setup.precision == "fp32":
            return "takes no fp32"
        if importlib.util.find_spec("flash_attn") is None:
            return "flash-attn is not installed"
    return ""
