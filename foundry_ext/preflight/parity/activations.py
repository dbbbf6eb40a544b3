"""A model's activations and gradients at every part of every layer, recorded by hooks.

T tokens, D hidden size, n layers. A whole run is the model as it is. In a run by parts, every layer
is given its input, so errors of the layers before it do not reach it. Documents are laid end to end
in the results, although transformers computes them one at a time, which needs no mask.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama import LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from foundry_ext.models.attention import varlen_attention
from foundry_ext.models.smollm2 import SmolLM2ForCausalLM
from foundry_ext.utils.constants import IGNORE_INDEX

EMBEDDING, NORM, LOGITS, LOSS, GRADIENT = "embedding", "final norm", "logits", "loss", "gradient"
NOT_LAYERS = (EMBEDDING, NORM, LOGITS, LOSS, GRADIENT)
"""Rows that are not decoder layers."""
WHOLE = "whole model"
"""The part of a row that comes from a whole run."""
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
LAYER_PARTS = (
    *("input_layernorm", *_PROJECTIONS, "rope", "attention", "o_proj"),
    *("post_attention_layernorm", "mlp", "block", GRADIENT),
)


class Site(NamedTuple):
    """A row of the comparison, such as "layer 3", and a part of it, such as "rope"."""

    row: str
    part: str


Activations = dict[Site, Tensor]


def layer_row(index: int) -> str:
    return f"layer {index}"


def rows(num_layers: int) -> list[str]:
    """Return the rows in the order in which a model computes them."""
    return [EMBEDDING, *map(layer_row, range(num_layers)), NORM, LOGITS, LOSS, GRADIENT]


@dataclass(frozen=True)
class Documents:
    """Documents laid end to end."""

    input_ids: Tensor
    """[T] int64."""
    lengths: Sequence[int]

    @property
    def spans(self) -> list[slice]:
        return [slice(*ends) for ends in pairwise(self.cu_seqlens.tolist())]

    @property
    def cu_seqlens(self) -> Tensor:
        ends = torch.tensor(self.lengths, device=self.input_ids.device).cumsum(0)
        return F.pad(ends, (1, 0)).to(torch.int32)

    @property
    def position_ids(self) -> Tensor:
        return torch.cat([torch.arange(n, device=self.input_ids.device) for n in self.lengths])

    @property
    def labels(self) -> Tensor:
        """[T]: every token but the first of a document."""
        return self.input_ids.masked_fill(self.position_ids == 0, IGNORE_INDEX)


@dataclass(frozen=True)
class Inputs:
    """Inputs of a run by parts, in the dtype that is compared."""

    hidden: Sequence[Tensor]
    """Inputs [T, D] of the n layers and of the final norm."""
    cotangent: Tensor
    """Gradient of a layer's output, [T, D]."""


@dataclass
class _Recording:
    """Outputs by site, one document after another."""

    outputs: dict[Site, list[Tensor]] = field(default_factory=dict)

    def add(self, site: Site, output: Tensor) -> None:
        by_token = output.detach().reshape(-1, output.shape[-1])
        self.outputs.setdefault(site, []).append(by_token)

    def joined(self) -> Activations:
        return {site: torch.cat(found) for site, found in self.outputs.items()}


def whole_of_theirs(model: LlamaForCausalLM, documents: Documents) -> Activations:
    """Run theirs; `LOSS` is [T, 1], nats per token with a label, in the order of the documents."""
    recording = _Recording()
    for span in documents.spans:
        ids = documents.input_ids[None, span]
        embedded = model.model.embed_tokens(ids).detach().requires_grad_()
        recording.add(Site(EMBEDDING, WHOLE), embedded)
        with _hooks(_watch_whole(model, recording)):
            logits = model(inputs_embeds=embedded, use_cache=False).logits[0]
        # As transformers' own loss: at least in fp32.
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(wide[:-1], ids[0, 1:], reduction="none")
        (gradient,) = torch.autograd.grad(losses.sum(), embedded)
        recording.add(Site(LOSS, WHOLE), losses[:, None])
        recording.add(Site(GRADIENT, WHOLE), gradient)
    return recording.joined()


def whole_of_ours(
    model: SmolLM2ForCausalLM, documents: Documents, *, backend: str, gradients: bool
) -> Activations:
    """Run ours on the documents as one pack; `LOSS` is [1, 1], the mean in nats."""
    recording = _Recording()
    model.attention_backend = backend
    pack = {
        "position_ids": documents.position_ids[None],
        "cu_seqlens": documents.cu_seqlens,
        "max_seqlen": max(documents.lengths),
    }
    with torch.no_grad(), _hooks(_watch_whole(model, recording, embedding=True)):
        model(input_ids=documents.input_ids[None], **pack)
    embedded = model.model.embed_tokens(documents.input_ids[None]).detach()
    embedded.requires_grad_(gradients)
    with torch.set_grad_enabled(gradients):
        loss = model(inputs_embeds=embedded, labels=documents.labels[None], **pack).loss
    recording.add(Site(LOSS, WHOLE), loss.reshape(1, 1))
    if gradients:
        num_labels = len(documents.input_ids) - len(documents.lengths)
        (gradient,) = torch.autograd.grad(loss * num_labels, embedded)
        recording.add(Site(GRADIENT, WHOLE), gradient)
    return recording.joined()


def parts_of_theirs(model: LlamaForCausalLM, documents: Documents, inputs: Inputs) -> Activations:
    """Run theirs with the given input of each layer, one document at a time."""
    recording, angles = _Recording(), []
    for span in documents.spans:
        given = [x[span].to(model.dtype).requires_grad_() for x in inputs.hidden]
        blocks: list[Tensor] = []
        rotary = model.model.rotary_emb.register_forward_hook(
            lambda _module, _args, output: angles.append(output)
        )
        with _hooks([*_feed(model, given), *_watch_parts(model, recording, blocks), rotary]):
            model(documents.input_ids[None, span], use_cache=False)
        cotangent = inputs.cotangent[span].to(model.dtype)
        _record_gradients(recording, given, blocks, cotangent)
    activations = recording.joined()
    cos, sin = (torch.cat(parts, dim=1) for parts in zip(*angles, strict=True))
    for index in range(len(model.model.layers)):
        q, k = (
            activations[Site(layer_row(index), name)]
            .unflatten(-1, (-1, model.config.head_dim))
            .transpose(0, 1)[None]
            for name in ("q_proj", "k_proj")
        )
        rotated = torch.cat(apply_rotary_pos_emb(q, k, cos, sin), dim=1)
        activations[Site(layer_row(index), "rope")] = rotated[0].transpose(0, 1).flatten(1)
    return activations


def parts_of_ours(
    model: SmolLM2ForCausalLM,
    documents: Documents,
    inputs: Inputs,
    *,
    backend: str,
    gradients: bool,
) -> Activations:
    """Run ours with the given input of each layer, on all documents as one pack."""
    recording, cu_seqlens = _Recording(), documents.cu_seqlens
    max_seqlen = max(documents.lengths)

    def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        recording.add(Site(layer_row(index), "rope"), torch.cat((q, k), dim=1).flatten(1))
        return varlen_attention(q, k, v, cu_seqlens, max_seqlen, backend=backend)

    given = [x.clone().requires_grad_(gradients) for x in inputs.hidden]
    blocks: list[Tensor] = []
    with _hooks([*_feed(model, given), *_watch_parts(model, recording, blocks)]):
        embedded = model.model.embed_tokens(documents.input_ids)
        hidden = model.model(embedded, documents.position_ids, lambda i: partial(attend, i))
        model.lm_head(model.model.norm(hidden))
    if gradients:
        _record_gradients(recording, given, blocks, inputs.cotangent)
    return recording.joined()


def _record_gradients(
    recording: _Recording, given: list[Tensor], blocks: list[Tensor], cotangent: Tensor
) -> None:
    """Record each layer's gradient of its input; a layer's output depends on its own input only."""
    cotangents = [cotangent.view_as(block) for block in blocks]
    gradients = torch.autograd.grad(blocks, given[:-1], cotangents)
    for index, gradient in enumerate(gradients):
        recording.add(Site(layer_row(index), GRADIENT), gradient)


@contextlib.contextmanager
def _hooks(handles: Sequence[Any]) -> Iterator[None]:
    """Remove hooks at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _feed(model: Any, given: Sequence[Tensor]) -> list[Any]:
    """Make every layer, and the final norm, take these inputs."""

    def replace(x: Tensor, _module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return x.view_as(args[0]), *args[1:]

    modules = [*model.model.layers, model.model.norm]
    return [
        module.register_forward_pre_hook(partial(replace, x))
        for module, x in zip(modules, given, strict=True)
    ]


def _watch_whole(model: Any, recording: _Recording, *, embedding: bool = False) -> list[Any]:
    modules = {layer_row(index): layer for index, layer in enumerate(model.model.layers)}
    modules |= {NORM: model.model.norm, LOGITS: model.lm_head}
    if embedding:
        modules[EMBEDDING] = model.model.embed_tokens
    return [_record(module, recording, Site(row, WHOLE)) for row, module in modules.items()]


def _watch_parts(model: Any, recording: _Recording, blocks: list[Tensor]) -> list[Any]:
    """Record the parts of every layer, and keep its outputs with their graphs in `blocks`."""
    handles = []
    for index, layer in enumerate(model.model.layers):
        row = layer_row(index)
        attention = layer.self_attn
        modules = {
            "input_layernorm": layer.input_layernorm,
            **{name: getattr(attention, name) for name in (*_PROJECTIONS, "o_proj")},
            "post_attention_layernorm": layer.post_attention_layernorm,
            "mlp": layer.mlp,
            "block": layer,
        }
        handles += [_record(module, recording, Site(row, name)) for name, module in modules.items()]
        handles.append(
            attention.o_proj.register_forward_pre_hook(
                lambda _module, args, row=row: recording.add(Site(row, "attention"), args[0])
            )
        )
        handles.append(
            layer.register_forward_hook(
                lambda _module, _args, output: blocks.append(_first(output))
            )
        )
    handles.append(_record(model.model.norm, recording, Site(NORM, NORM)))
    handles.append(_record(model.lm_head, recording, Site(LOGITS, LOGITS)))
    return handles


def _record(module: Any, recording: _Recording, site: Site) -> Any:
    return module.register_forward_hook(
        lambda _module, _args, output: recording.add(site, _first(output))
    )


def _first(output: Any) -> Tensor:
    """Return the hidden state, which transformers' layer returns in a tuple."""
    return output if isinstance(output, Tensor) else output[0]
