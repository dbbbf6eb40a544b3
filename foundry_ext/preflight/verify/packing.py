"""Compares the first packs of a run with each of their documents alone.

The reference is transformers' own Llama, in peft's own wrapper if there is an adapter, with the
weights of the model that the YAML builds. It reads one document at a time, from the stored tokens,
so it shares no collator, offsets or kernels with the packed model.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import compress, pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from composer.utils import get_device
from llmfoundry.utils.builders import build_composer_model
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.models.llama import LlamaForCausalLM

from foundry_ext.models.attention import BACKENDS, resolve_backend
from foundry_ext.packing.batch import Pack, split_batch
from foundry_ext.packing.collator import Document
from foundry_ext.preflight.inspect.packs import open_loader, open_tokenizer
from foundry_ext.preflight.verify.checks import Check, largest, relative_distance
from foundry_ext.utils.constants import IGNORE_INDEX
from foundry_ext.utils.errors import UserError

# Tolerances in fp32, a hundred times the rounding that was measured. A leak between documents
# changes logits by 1e-1 or more.
LOGITS = 1e-3  # largest difference over the standard deviation of the logits
LOSS = 1e-5  # relative
GRADIENT = 1e-3  # norm of the difference over the norm of the gradient


@dataclass(frozen=True)
class Reference:
    """Results of transformers: logits [L, V] of each document by pack, mean loss, gradients."""

    logits: list[list[Tensor]]
    loss: float
    gradients: dict[str, Tensor]


def check_packing(
    config: dict[str, Any], notes: list[str], *, num_packs: int, most_tokens: int
) -> list[Check]:
    """Compare content, loss, gradients, logits and isolation of the first packs with the reference.

    Args:
        config: the resolved configuration.
        notes: receives a line for each setting that was not used as configured.
        num_packs: packs to compare.
        most_tokens: tokens per pack; longer packs are cut.
    """
    tokenizer = open_tokenizer(config)
    settings = {key: value for key, value in config["model"].items() if key != "name"}
    torch.manual_seed(int(config.get("seed", 17)))
    device = get_device()
    ours: Any = device.module_to_device(build_composer_model("smollm2_packed", settings, tokenizer))
    _, dataset = open_loader(config, "train", tokenizer)
    chosen, was_cut = _first_documents(dataset, num_packs, most_tokens)
    if was_cut:
        notes.append(
            f"packs of {dataset.sampler.capacity} tokens are cut to {most_tokens} (--tokens),"
            " and long documents to a part"
        )
    collate = replace(dataset.collator, pack_tokens=max(most_tokens, 1), max_documents=None)
    packs = [device.batch_to_device(collate(documents)) for documents in chosen]
    if _without_dropout(ours):
        notes.append("dropout is off in the comparison of packed and unpacked")
    if _randomise_lora_b(ours):
        notes.append("lora_B, which starts at zero, gets random values in that comparison")
    reference = _reference_outputs(_build_reference_model(ours), chosen)
    lengths = [len(document.input_ids) for pack in chosen for document in pack]
    what = f"{len(packs)} packs, {len(lengths)} documents, {sum(lengths)} tokens"
    size = int(config.get("device_train_microbatch_size") or 1)
    checks = [_check_content(packs, chosen, what)]
    checks += _check_training(ours, packs, size, reference, what)
    model = ours.model.eval()
    for backend in _backends(ours):
        ours.inner_model.attention_backend = backend
        checks.append(_check_logits(model, packs, reference, backend))
        checks.append(_check_leaks(model, packs, backend))
    return checks


def _first_documents(
    dataset: Any, num_packs: int, most_tokens: int
) -> tuple[list[list[Document]], bool]:
    """Return the documents of the epoch's first packs, and whether any pack was cut.

    In a pack that is cut, a long document is reduced to the window where its labels start, so that
    at least three documents fit.
    """
    chosen, was_cut = [], False
    for index in range(min(num_packs, dataset.sampler.num_packs(0))):
        documents = dataset.documents.read(dataset.sampler.documents_of_pack(0, index))
        if sum(len(document.input_ids) for document in documents) <= most_tokens:
            chosen.append(documents)
            continue
        was_cut, cut, left = True, [], most_tokens
        for document in documents:
            part = _window(document, max(most_tokens // 3, 2))
            if len(part.input_ids) <= left:
                cut.append(part)
                left -= len(part.input_ids)
        chosen.append(cut)
    return chosen, was_cut


def _window(document: Document, most: int) -> Document:
    start = int(np.argmax(document.loss_mask)) - most // 2  # argmax finds the first label
    start = max(min(start, len(document.input_ids) - most), 0)
    return Document(
        input_ids=document.input_ids[start : start + most],
        loss_mask=np.array(document.loss_mask[start : start + most]),
    )


def _without_dropout(ours: Any) -> bool:
    """Turn dropout off; return whether there was any."""
    drops = [module for module in ours.modules() if isinstance(module, nn.Dropout) and module.p > 0]
    for module in drops:
        module.p = 0.0
    inner = ours.inner_model.config
    had = bool(drops) or inner.attention_dropout > 0
    inner.attention_dropout = 0.0
    return had


@torch.no_grad()
def _randomise_lora_b(ours: Any) -> bool:
    """Give lora_B random values if it is zero, because an idle adapter would hide its mistakes."""
    zero = [p for name, p in ours.named_parameters() if "lora_B" in name and not p.any()]
    for parameter in zero:
        parameter.normal_(std=0.02)
    return bool(zero)


def _build_reference_model(ours: Any) -> Any:
    theirs: Any = LlamaForCausalLM(ours.inner_model.config)
    if ours.using_peft:
        adapter = next(iter(ours.model.peft_config.values())).to_dict()
        theirs = get_peft_model(theirs, LoraConfig(**{**adapter, "init_lora_weights": True}))
    theirs.load_state_dict(ours.model.state_dict(), strict=True)
    return theirs.to(next(ours.parameters()).device).eval()


def _labels(document: Document) -> Tensor:
    # Ids of a table may have two bytes, in which -100 would be another id.
    labels = np.where(document.loss_mask, document.input_ids.astype(np.int64), IGNORE_INDEX)
    return torch.from_numpy(labels[1:].astype(np.int64))


def _reference_outputs(theirs: Any, chosen: Sequence[Sequence[Document]]) -> Reference:
    total = max(sum(int(doc.loss_mask[1:].sum()) for pack in chosen for doc in pack), 1)
    device = next(theirs.parameters()).device
    loss, every = 0.0, []
    for pack in chosen:
        of_pack = []
        for document in pack:
            ids = torch.from_numpy(np.asarray(document.input_ids, dtype=np.int64)).to(device)
            logits = theirs(input_ids=ids[None], use_cache=False).logits[0]
            labels = _labels(document).to(device)  # cross_entropy's default ignores IGNORE_INDEX
            part = F.cross_entropy(logits[:-1], labels, reduction="sum")
            (part / total).backward()
            loss += float(part.detach()) / total
            of_pack.append(logits.detach())
        every.append(of_pack)
    return Reference(every, loss, _gradients(theirs))


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_parameters()
    return {name.replace("_orig_mod.", ""): p.grad for name, p in named if p.grad is not None}


def _check_content(packs: Sequence[Pack], chosen: Sequence[Sequence[Document]], what: str) -> Check:
    name = "a pack holds its documents, each with its own positions and labels"
    for number, (pack, documents) in enumerate(zip(packs, chosen, strict=True)):
        ends = pack["cu_seqlens"].tolist()[: len(documents) + 1]
        for index, document in enumerate(documents):
            where = f"pack {number}, document {index} of {len(documents)}"
            length = len(document.input_ids)
            if len(ends) <= index + 1 or ends[index + 1] - ends[index] != length:
                return Check(name, False, f"{where}: its end is not in cu_seqlens {ends}")
            row = slice(ends[index], ends[index + 1])
            expected = {
                "input_ids": document.input_ids.tolist(),
                "position_ids": list(range(length)),
                "labels": [IGNORE_INDEX, *_labels(document).tolist()],
            }
            for key, values in expected.items():
                if pack[key][0, row].tolist() != values:
                    return Check(name, False, f"{where}: {key} differ")
    return Check(name, True, what)


def _check_training(
    ours: Any, packs: Sequence[Pack], size: int, reference: Reference, what: str
) -> list[Check]:
    """Compare loss and gradients of one step, computed as in training.

    Microbatches are weighted by their labelled tokens; the model is compiled if the YAML says so.
    """
    microbatches = split_batch(list(packs), size)
    total = max(sum(batch["num_loss_tokens"] for batch in microbatches), 1)
    ours.train()
    loss = 0.0
    for batch in microbatches:
        part = ours(batch).loss * (batch["num_loss_tokens"] / total)
        part.backward()
        loss += float(part.detach())
    off = abs(loss - reference.loss) / max(abs(reference.loss), 1e-9)
    name = "packed loss equals the loss of each document alone in transformers' Llama"
    detail = f"{loss:.6f} and {reference.loss:.6f}, difference {off:.1e}, allowed {LOSS:.0e}"
    checks = [Check(name, off <= LOSS, f"{detail} ({what})")]
    computed = _gradients(ours.model)
    name = "packed gradients equal those of each document alone"
    if computed.keys() != reference.gradients.keys():
        odd = sorted(computed.keys() ^ reference.gradients.keys())[:3]
        return [*checks, Check(name, False, f"only one of the two has a gradient of {odd}")]
    where, worst = largest(
        {
            key: relative_distance(gradient, computed[key])
            for key, gradient in reference.gradients.items()
        }
    )
    detail = f"{len(computed)} parameters, largest difference {worst:.1e} at {where}"
    ours.zero_grad()
    return [*checks, Check(name, worst <= GRADIENT, f"{detail}, allowed {GRADIENT:.0e}")]


def _backends(ours: Any) -> list[str]:
    weight = next(ours.parameters())
    names = []
    for name in BACKENDS[1:]:
        with contextlib.suppress(UserError):  # not available for this device or type
            names.append(resolve_backend(name, device=weight.device.type, dtype=weight.dtype))
    return names


@torch.no_grad()
def _logits(model: Any, pack: Pack, ids: Tensor | None = None) -> Tensor:
    rest = {key: pack[key] for key in ("position_ids", "cu_seqlens", "max_seqlen")}
    return model(input_ids=pack["input_ids"] if ids is None else ids, **rest).logits[0]


def _spans(pack: Pack) -> list[tuple[int, int]]:
    """Return (start, end) of each document, from positions: cu_seqlens may be what is wrong."""
    starts = (pack["position_ids"][0] == 0).nonzero().flatten().tolist()
    return list(pairwise([*starts, pack["input_ids"].shape[1]]))[: pack["num_documents"]]


def _check_logits(model: Any, packs: Sequence[Pack], reference: Reference, backend: str) -> Check:
    errors: dict[str, float] = {}
    for number, (pack, expected) in enumerate(zip(packs, reference.logits, strict=True)):
        ours = _logits(model, pack)
        for index, (alone, (start, end)) in enumerate(zip(expected, _spans(pack), strict=False)):
            where = f"pack {number}, document {index} of {len(expected)}"
            errors[where] = float((ours[start:end] - alone).abs().max() / alone.std())
    where, worst = largest(errors)
    detail = f"largest difference {worst:.1e} standard deviations, {where}, allowed {LOGITS:.0e}"
    name = f"logits with {backend} equal those of each document alone"
    return Check(name, worst <= LOGITS, detail)


def _rounds(number: int) -> Iterator[list[bool]]:
    """Yield which documents to change, so that for every pair a round changes only the first.

    There are 2 log2(number) rounds: the documents whose index has a certain bit set, and the rest.
    """
    for bit in range((number - 1).bit_length()):
        for side in (0, 1):
            yield [(index >> bit) & 1 == side for index in range(number)]


def _check_leaks(model: Any, packs: Sequence[Pack], backend: str) -> Check:
    name = f"no document sees another with {backend}"
    rounds = 0
    for number, pack in enumerate(packs):
        spans, before = _spans(pack), _logits(model, pack)
        for changed in _rounds(len(spans)):
            rounds += 1
            ids = pack["input_ids"].clone()
            for start, end in compress(spans, changed):
                ids[0, start:end] = (ids[0, start:end] + 1) % model.config.vocab_size
            moved = (_logits(model, pack, ids) - before).abs().amax(-1)
            for index, ((start, end), change) in enumerate(zip(spans, changed, strict=True)):
                most = float(moved[start:end].max())
                if (most > 0) != change:
                    detail = (
                        f"pack {number}, document {index}: its logits moved by {most:.1e} when the"
                        f" tokens of documents {np.flatnonzero(changed)[:8].tolist()} changed"
                    )
                    return Check(name, False, detail)
    return Check(name, True, f"bitwise, {rounds} rounds of changed documents")
