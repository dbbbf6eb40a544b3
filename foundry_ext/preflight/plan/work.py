"""The work that a training step asks of a device: products, attention and passes over memory.

Counted by running one decoder layer and two, on a CPU, for a few tokens: every operator's FLOPs and
bytes grow linearly in the tokens, except for attention, whose FLOPs are those of models/flops.py.
Compiled layers are counted in their graphs, see fused.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from foundry_ext.models.activations import autocast, one_document
from foundry_ext.models.decoder import SmolLM2DecoderLayer, decoder_layer
from foundry_ext.models.loss import linear_cross_entropy
from foundry_ext.models.smollm2 import SmolLM2ForCausalLM
from foundry_ext.preflight.plan.fused import graph_samples
from foundry_ext.preflight.plan.operators import Op, Sample, fit, record

_FEW, _MANY = 64, 128  # tokens


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """Work of a microbatch, apart from attention's FLOPs and the optimizer."""

    one_layer: list[Op]
    """A model with one layer, and with a vocabulary of a few tokens."""
    two_layers: list[Op]
    loss: list[Op]
    """The loss of a chunk of rows; its tokens are rows."""
    compiled: list[Op] | None
    """A compiled layer; None if layers are not compiled."""


def count_work(
    build: Callable[[int], nn.Module],
    *,
    vocabulary: int,
    hidden: int,
    precision: str,
    compiled: bool,
) -> StepWork:
    """Count a microbatch's work on a CPU; with `compiled`, which takes ten seconds, as on a GPU.

    Args:
        build: a function from the number of layers to a model on the CPU.
        vocabulary: V.
        hidden: D.
        precision: as the trainer names it.
        compiled: whether layers and loss are compiled.
    """

    def run(num_layers: int, num_tokens: int) -> list[Sample]:
        model = build(num_layers).train()
        if precision == "bf16":
            model = model.bfloat16()
        _prepare(model)
        return record(lambda: _forward_backward(model, num_tokens, precision))

    def both(samples: Callable[[int], list[Sample]]) -> list[Op]:
        return fit(samples(_FEW), samples(_MANY), (_FEW, _MANY))

    return StepWork(
        one_layer=both(lambda tokens: run(1, tokens)),
        two_layers=both(lambda tokens: run(2, tokens)),
        loss=_with_softmax(
            both(lambda rows: _loss_samples(rows, vocabulary, hidden, precision)),
            row=vocabulary * (4 if precision == "fp32" else 2),
            fused=compiled,
        ),
        compiled=both(lambda tokens: _compiled_samples(build, tokens, precision))
        if compiled
        else None,
    )


def _forward_backward(model: nn.Module, num_tokens: int, precision: str) -> None:
    with autocast(precision):
        loss = model(**one_document(num_tokens)).loss
    loss.backward()


def _prepare(model: nn.Module, compiled: Any = None) -> None:
    """Fix the attention, whose operators must not depend on the processor."""
    for module in model.modules():
        if isinstance(module, SmolLM2ForCausalLM):
            module.attention_backend = "blockwise"
        if isinstance(module, SmolLM2DecoderLayer):
            module.compiled = compiled


def _with_softmax(ops: list[Op], *, row: float, fused: bool) -> list[Op]:
    """Return the loss's operators with its passes over logits, of `row` bytes a row, as two."""
    if not fused:
        return ops
    others = [op for op in ops if op.kind == "product" or op.bytes[1] < row]
    return [*others, *(Op("pass", (0.0, 0.0), (0.0, passes * row)) for passes in (1, 2))]


def _loss_samples(rows: int, vocabulary: int, hidden: int, precision: str) -> list[Sample]:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    states = torch.zeros(rows, hidden, dtype=dtype, requires_grad=True)
    weight = torch.zeros(vocabulary, hidden, dtype=dtype, requires_grad=True)
    targets = torch.zeros(rows, dtype=torch.long)

    def work() -> None:
        with autocast(precision):
            linear_cross_entropy(states, weight, targets)

    return record(work)


def _compiled_samples(
    build: Callable[[int], nn.Module], num_tokens: int, precision: str
) -> list[Sample]:
    """Return the kernels of one compiled layer, forward and backward.

    Of two layers the second one counts: the first one's input may need no gradient.
    """
    forward: list[list[Sample]] = []
    backward: list[list[Sample]] = []

    def counting(found: list[list[Sample]]) -> Callable[..., Any]:
        def count(module: Any, _inputs: Any) -> Any:
            found.append(list(graph_samples(module.graph)))
            return make_boxed_func(module.forward)

        return count

    backend: Any = aot_autograd(
        fw_compiler=counting(forward),
        bw_compiler=counting(backward),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    model = build(2).train()
    if precision == "bf16":
        model = model.bfloat16()
    _prepare(model, torch.compile(decoder_layer, backend=backend))
    torch.compiler.reset()
    _forward_backward(model, num_tokens, precision)
    return [*forward[-1], *backward[0]]  # the second layer's backward pass is the first to run
