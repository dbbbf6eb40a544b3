"""Compare loss and gradients on the null GPU, emulated under amp_bf16, with the CPU's in fp32.

python -m tests.nullgpu.values full lora ...
"""

import itertools
import sys
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.variants import Bench, Setup, share_parameters
from tests.nullgpu.emulate import Emulate
from tests.nullgpu.kit import give

SHAPE = {
    **{"num_hidden_layers": 2, "hidden_size": 192, "intermediate_size": 256, "vocab_size": 512},
    **{"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 64},
}
LENGTHS = (70, 1, 129)
VARIANTS = ((False, "torch_varlen"), (True, "torch_varlen"), (False, "sdpa"))


def make_batch() -> dict[str, Any]:
    """Return one pack of documents; 0.7 of the tokens have labels."""
    generator = torch.Generator().manual_seed(3)
    num_tokens = sum(LENGTHS)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    ids = torch.randint(0, SHAPE["vocab_size"], (1, num_tokens), generator=generator)
    is_label = torch.rand(1, num_tokens, generator=generator) < 0.7
    labels = ids.masked_fill((positions == 0) | ~is_label, -100)
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    return {
        "input_ids": ids,
        "position_ids": positions,
        "labels": labels,
        "cu_seqlens": ends.to(torch.int32),
        "max_seqlen": 256,
        "num_loss_tokens": int((labels[:, 1:] != -100).sum()),
    }


def build(method: str, *, checkpointing: bool, backend: str) -> torch.nn.Module:
    """Build a model on the CPU, with an adapter that is no longer zero."""
    setup = Setup(
        method=method,
        precision="fp32",
        config_overrides=SHAPE,
        activation_checkpointing=checkpointing,
        backend=backend,
    )
    model = Bench(setup).source
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad and method != "full":
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def train(model: torch.nn.Module, batch: dict[str, Any], device: str, *, amp: bool) -> Any:
    """Return (loss, gradients by name) of one step."""
    model, batch = model.to(device), {k: _to(v, device) for k, v in batch.items()}
    with torch.autocast(device, torch.bfloat16, enabled=amp):
        loss = model(**batch).loss
    loss.backward()
    named = ((name, p.grad) for name, p in model.named_parameters())
    return loss.item(), {name: grad.cpu() for name, grad in named if grad is not None}


def _to(value: Any, device: str) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def worst(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """Return the largest relative error of a gradient, by its norm."""
    assert ours.keys() == reference.keys(), ours.keys() ^ reference.keys()
    errors = (
        (ours[k] - g).double().norm() / (g.double().norm() + 1e-12) for k, g in reference.items()
    )
    return max(float(error) for error in errors)


def stock(batch: dict[str, Any]) -> Any:
    """Return transformers' loss and gradients, one document at a time, on the CPU in fp32."""
    ours = build("full", checkpointing=False, backend="sdpa")
    model = LlamaForCausalLM(Setup(config_overrides=SHAPE).config())
    share_parameters(ours, model)
    losses = []
    ends = batch["cu_seqlens"].tolist()
    for start, end in itertools.pairwise(ends):
        rows = slice(start, end)
        logits = model(input_ids=batch["input_ids"][:, rows]).logits[0, :-1]
        target = batch["labels"][0, rows][1:]
        losses.append(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
    loss = sum(losses) / batch["num_loss_tokens"]
    loss.backward()  # pyright: ignore
    return float(loss), {k: p.grad for k, p in model.named_parameters() if p.grad is not None}


def main() -> None:
    batch, results = make_batch(), []
    hugging_face = stock(batch)
    for method in sys.argv[1:]:
        for checkpointing, backend in VARIANTS:
            settings = {"checkpointing": checkpointing, "backend": backend}
            on_cpu = {**settings, "backend": "sdpa"}
            exact = train(build(method, **on_cpu), batch, "cpu", amp=False)
            rounded = train(build(method, **on_cpu), batch, "cpu", amp=True)
            with Emulate():
                gpu = train(build(method, **settings), batch, "cuda", amp=True)
            result = {"method": method, **settings, "loss": gpu[0], "exact_loss": exact[0]}
            result |= {"error": worst(gpu[1], exact[1]), "cpu_error": worst(rounded[1], exact[1])}
            if method == "full":
                result["stock_loss"] = hugging_face[0]
                result["stock_error"] = worst(exact[1], hugging_face[1])
            results.append(result)
    give(results)


if __name__ == "__main__":
    main()
