"""The first packs of a run, exactly as its model gets them, and the totals of an epoch.

Packs come from the same builder, sampler and collator as in training; what is said of a token,
its position, its document and whether it carries loss, is read off the pack's own tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from llmfoundry.data.dataloader import build_dataloader
from llmfoundry.utils.builders import build_tokenizer
from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from foundry_ext.data.dataset import PackedDataset
from foundry_ext.data.documents import Outcome
from foundry_ext.packing.batch import Pack
from foundry_ext.utils.constants import IGNORE_INDEX

LOADERS = ("train", "eval")
_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}


@dataclass(frozen=True)
class TokenView:
    text: str
    id: int
    position: int
    has_loss: bool
    """Whether the model is to predict this token from those before it in its document."""


@dataclass(frozen=True)
class DocumentView:
    index: int
    """Which document of the data."""
    source: str
    outcome: str
    num_truncated_tokens: int
    """Tokens of its row that are not here, under `overlong: truncate`."""
    tokens: list[TokenView]

    @property
    def num_loss_tokens(self) -> int:
        return sum(token.has_loss for token in self.tokens)


@dataclass(frozen=True)
class PackView:
    batch: int
    place: int
    """In its batch, from 0."""
    documents: list[DocumentView]
    num_computed_tokens: int
    """Tokens the model computes, those that fill a fixed shape or an empty pack included."""
    capacity: int
    num_tokens: int
    num_loss_tokens: int

    @property
    def packing_efficiency(self) -> float:
        return self.num_tokens / self.capacity


@dataclass(frozen=True)
class Epoch:
    """Of the first epoch; every other one has the same documents."""

    num_documents: int
    num_tokens: int
    num_loss_tokens: int
    num_packs: int
    num_batches: int
    batch_packs: int
    """Packs of a global batch."""
    capacity: int
    max_seq_len: int
    longest: int
    """Tokens of the longest document."""

    @property
    def packing_efficiency(self) -> float:
        return self.num_tokens / (self.num_packs * self.capacity)

    @property
    def num_empty_packs(self) -> int:
        """Without a token or weight; they complete the last global batch."""
        return max(self.num_batches * self.batch_packs - self.num_packs, 0)


@dataclass(frozen=True)
class Inspection:
    name: str
    """Of the YAML."""
    loader: str
    tokenizer: str
    epoch: Epoch
    sources: list[dict[str, Any]] = field(default_factory=list)
    """PackedDataset's description: name, split, revision, documents, tokens, counts of each."""
    packs: list[PackView] = field(default_factory=list)


def inspect_config(
    config: Mapping[str, Any], *, name: str, loader: str = "train", num_packs: int = 4
) -> Inspection:
    """Builds a loader of a resolved configuration and looks at its first packs.

    Args:
        name: of the YAML, for the page's title.
        loader: train or eval; of several eval loaders the first.

    Raises:
        ValueError: no such loader, or one that is not packed; what the loader itself refuses.
    """
    if num_packs < 1:
        raise ValueError(f"packs: {num_packs} is below 1")
    tokenizer = open_tokenizer(config)
    batches, dataset = open_loader(config, loader, tokenizer)
    dataset.sampler.set_epoch(0)
    packs = []
    for number, batch in enumerate(batches):
        chosen = dataset.sampler.batch(number)
        for place, (pack, indices) in enumerate(zip(batch, chosen, strict=True)):
            packs.append(_view(pack, indices, dataset, tokenizer, number, place))
        if len(packs) >= num_packs:
            break
    return Inspection(
        name=name,
        loader=loader,
        tokenizer=config["tokenizer"]["name"],
        epoch=totals_of(dataset),
        sources=dataset.description,
        packs=packs[:num_packs],
    )


def open_tokenizer(config: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """As training builds it."""
    section = config["tokenizer"]
    return build_tokenizer(section["name"], dict(section.get("kwargs") or {}))


def open_loader(
    config: Mapping[str, Any], loader: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[Any, PackedDataset]:
    """A loader, as training builds it but for its workers, and what it reads.

    Args:
        loader: train or eval; of several eval loaders the first.

    Raises:
        ValueError: no such loader, or one that is not packed; what the loader itself refuses.
    """
    section, size = _section(config, loader)
    spec = build_dataloader({**section, "num_workers": 0}, tokenizer, size)
    dataset = getattr(spec.dataloader, "dataset", None)
    assert isinstance(dataset, PackedDataset), type(dataset)
    return spec.dataloader, dataset


def _section(config: Mapping[str, Any], loader: str) -> tuple[dict[str, Any], int]:
    """The loader's section, and packs of a batch on all devices together."""
    section: Any = config.get(f"{loader}_loader")
    if isinstance(section, list):
        section = {key: value for key, value in section[0].items() if key != "label"}
    if not section:
        raise ValueError(f"{loader}_loader: there is none in this YAML")
    if not str(section.get("name")).startswith("packed_"):
        raise ValueError(
            f"{loader}_loader.name: {section.get('name')!r} makes no packs; packed_finetuning and"
            " packed_text do"
        )
    key = "global_train_batch_size" if loader == "train" else "device_eval_batch_size"
    return dict(section), config.get(key, 1)


def _view(
    pack: Pack,
    indices: np.ndarray,
    dataset: PackedDataset,
    tokenizer: PreTrainedTokenizerBase,
    batch: int,
    place: int,
) -> PackView:
    ids, positions, labels = (
        pack[key][0].tolist() for key in ("input_ids", "position_ids", "labels")
    )
    ends = pack["cu_seqlens"].tolist()
    documents = []
    for number, index in enumerate(map(int, indices)):
        tokens = [
            TokenView(
                text=token_text(ids[at], tokenizer),
                id=ids[at],
                position=positions[at],
                has_loss=labels[at] != IGNORE_INDEX,
            )
            for at in range(ends[number], ends[number + 1])
        ]
        outcome, num_truncated_tokens = (
            int(values[index])
            for values in (dataset.documents.outcomes, dataset.documents.num_truncated_tokens)
        )
        documents.append(
            DocumentView(
                index=index,
                source=_source_of(dataset, index),
                outcome=Outcome(outcome).name.lower(),
                num_truncated_tokens=num_truncated_tokens,
                tokens=tokens,
            )
        )
    return PackView(
        batch=batch,
        place=place,
        documents=documents,
        num_computed_tokens=len(ids),
        capacity=dataset.sampler.capacity,
        num_tokens=pack["num_tokens"],
        num_loss_tokens=pack["num_loss_tokens"],
    )


def _source_of(dataset: PackedDataset, index: int) -> str:
    source = getattr(dataset.documents, "source", None)
    return dataset.description[0 if source is None else int(source[index])]["name"]


def token_text(token: int, tokenizer: Any) -> str:
    """What a token stands for; one that is no whole character as its bytes, <E2><82>."""
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    if "\ufffd" not in text:
        return text
    raw = tokenizer.convert_ids_to_tokens(token)
    if isinstance(raw, str) and all(character in _BYTES for character in raw):
        return "".join(f"<{_BYTES[character]:02X}>" for character in raw)
    return str(raw)


def totals_of(dataset: PackedDataset) -> Epoch:
    documents, sampler = dataset.documents, dataset.sampler
    used = np.flatnonzero(documents.lengths)
    # Nothing comes before a document's first token to predict it.
    num_loss = sum(int(documents[int(index)].loss_mask[1:].sum()) for index in used)
    return Epoch(
        num_documents=len(used),
        num_tokens=int(documents.lengths.sum()),
        num_loss_tokens=num_loss,
        num_packs=len(sampler.plan(0)),
        num_batches=len(sampler),
        batch_packs=sampler.batch_packs * sampler.num_replicas,
        capacity=sampler.capacity,
        max_seq_len=dataset.collator.max_seq_len,
        longest=int(documents.lengths.max()),
    )
