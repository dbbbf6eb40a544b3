"""The first packs of a run, exactly as its model receives them, and the totals of an epoch.

Packs come from the same builder, sampler and collator as in training. A token's position, its
document and whether it carries loss are read from the pack's own tensors.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from llmfoundry.data.dataloader import build_dataloader
from llmfoundry.utils.builders import build_tokenizer
from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from foundry_ext.data.dataset import PackedDataset
from foundry_ext.data.special_tokens import SpecialTokens
from foundry_ext.packing.batch import Pack
from foundry_ext.preflight.components import without_remote_code
from foundry_ext.preflight.inspect.layouts import Layouts, lay_out
from foundry_ext.utils.constants import IGNORE_INDEX
from foundry_ext.utils.errors import UserError, naming
from foundry_ext.utils.progress import announce

_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}


@dataclass(frozen=True)
class TokenView:
    text: str
    id: int
    position: int
    has_loss: bool
    """True if the model learns to predict this token from the document's tokens before it."""


@dataclass(frozen=True)
class DocumentView:
    index: int
    """Index of the document in the data."""
    source: str
    outcome: str
    num_truncated_tokens: int
    """Tokens of its row that `overlong: truncate` removed."""
    tokens: list[TokenView]

    @property
    def num_loss_tokens(self) -> int:
        return sum(token.has_loss for token in self.tokens)


@dataclass(frozen=True)
class PackView:
    batch: int
    index_in_batch: int
    documents: list[DocumentView]
    num_computed_tokens: int
    """Tokens the model computes, including those that fill a fixed shape or an empty pack."""
    capacity: int
    num_tokens: int
    num_loss_tokens: int

    @property
    def packing_efficiency(self) -> float:
        return self.num_tokens / self.capacity


@dataclass(frozen=True)
class Epoch:
    """Totals of the first epoch. Every epoch has the same documents."""

    num_documents: int
    num_tokens: int
    num_loss_tokens: int
    num_packs: int
    num_batches: int
    batch_packs: int
    """Packs per global batch."""
    capacity: int
    max_seq_len: int
    longest: int
    """Tokens in the longest document."""

    @property
    def packing_efficiency(self) -> float:
        return self.num_tokens / (self.num_packs * self.capacity)

    @property
    def num_empty_packs(self) -> int:
        """Packs without tokens or weight that complete the last global batch."""
        return max(self.num_batches * self.batch_packs - self.num_packs, 0)


@dataclass(frozen=True)
class Inspection:
    name: str
    """Name of the YAML."""
    loader: str
    tokenizer: str
    special_tokens: str
    """Sentence on the special tokens at the start and end of a row."""
    epoch: Epoch
    sources: list[dict[str, Any]] = field(default_factory=list)
    """PackedDataset's description: per source name, split, revision, documents, tokens, counts."""
    packs: list[PackView] = field(default_factory=list)
    layouts: Layouts | None = None
    """The first epoch padded, unpadded and packed."""


def inspect_config(
    config: Mapping[str, Any],
    *,
    name: str,
    loader: str = "train",
    num_packs: int = 4,
    predict: Callable[[Layouts, PackedDataset], Layouts] | None = None,
) -> Inspection:
    """Build a loader of a resolved configuration and return its first packs.

    Args:
        config: the resolved configuration.
        name: name of the YAML, for the page's title.
        loader: "train", or "eval" for the first eval loader.
        num_packs: how many packs to return.
        predict: adds speeds to the layouts of the training data.

    Raises:
        UserError: the loader is missing or not packed, or its builder rejects the configuration.
    """
    if num_packs < 1:
        raise UserError(f"packs: must be at least 1, not {num_packs}")
    tokenizer = open_tokenizer(config)
    batches, dataset = open_loader(config, loader, tokenizer)
    dataset.sampler.set_epoch(0)
    packs = _pack_views(batches, dataset, tokenizer, num_packs)
    layouts = lay_out(dataset)
    if predict is not None and loader == "train":
        layouts = predict(layouts, dataset)
    return Inspection(
        name=name,
        loader=loader,
        tokenizer=config["tokenizer"]["name"],
        special_tokens=SpecialTokens(tokenizer).describe(),
        epoch=totals_of(dataset),
        sources=dataset.description,
        packs=packs,
        layouts=layouts,
    )


def open_tokenizer(config: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """Return the tokenizer as training builds it."""
    section = config["tokenizer"]
    # The tokenizers library raises nothing more specific.
    with naming(f"tokenizer ({section['name']})", (Exception,)):
        kwargs = without_remote_code("tokenizer", section["name"], section.get("kwargs") or {})
        return build_tokenizer(section["name"], kwargs)


def open_loader(
    config: Mapping[str, Any], loader: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[Any, PackedDataset]:
    """Return a loader as training builds it, but without workers, and its dataset.

    Args:
        config: the resolved configuration.
        loader: "train", or "eval" for the first eval loader.
        tokenizer: the run's tokenizer.

    Raises:
        UserError: the loader is missing or not packed, or its builder rejects the configuration.
    """
    section, size = loader_section(config, loader)
    announce(f"reading and tokenising the data of {loader}_loader")
    spec = build_dataloader({**section, "num_workers": 0}, tokenizer, size)
    dataset = getattr(spec.dataloader, "dataset", None)
    assert isinstance(dataset, PackedDataset), type(dataset)
    return spec.dataloader, dataset


def loader_section(config: Mapping[str, Any], loader: str) -> tuple[dict[str, Any], int]:
    """Return the loader's section, and the number of packs in a batch over all devices."""
    section: Any = config.get(f"{loader}_loader")
    if isinstance(section, list):
        section = {key: value for key, value in section[0].items() if key != "label"}
    if not section:
        raise UserError(f"{loader}_loader: this YAML has none")
    if not str(section.get("name")).startswith("packed_"):
        raise UserError(
            f"{loader}_loader.name: must be packed_finetuning or packed_text, not"
            f" {section.get('name')!r}, which makes no packs"
        )
    key = "global_train_batch_size" if loader == "train" else "device_eval_batch_size"
    return dict(section), config.get(key, 1)


def _pack_views(
    batches: Iterable[Sequence[Pack]],
    dataset: PackedDataset,
    tokenizer: PreTrainedTokenizerBase,
    num_packs: int,
) -> list[PackView]:
    """Return the first packs of the loader's batches."""
    packs: list[PackView] = []
    for batch_index, batch in enumerate(batches):
        indices_of_packs = dataset.sampler.batch(batch_index)
        for index, (pack, indices) in enumerate(zip(batch, indices_of_packs, strict=True)):
            documents = _document_views(pack, indices, dataset, tokenizer)
            packs.append(
                PackView(
                    batch=batch_index,
                    index_in_batch=index,
                    documents=documents,
                    num_computed_tokens=pack["input_ids"].shape[1],
                    capacity=dataset.sampler.capacity,
                    num_tokens=pack["num_tokens"],
                    num_loss_tokens=pack["num_loss_tokens"],
                )
            )
        if len(packs) >= num_packs:
            break
    return packs[:num_packs]


def _document_views(
    pack: Pack, indices: np.ndarray, dataset: PackedDataset, tokenizer: PreTrainedTokenizerBase
) -> list[DocumentView]:
    """Return the documents of a pack; `indices` are their indices in the data."""
    ids, positions, labels = (
        pack[key][0].tolist() for key in ("input_ids", "position_ids", "labels")
    )
    bounds = pairwise(pack["cu_seqlens"].tolist())
    views = []
    # cu_seqlens may continue after the last document, over tokens that fill a fixed shape.
    for index, (start, end) in zip(map(int, indices), bounds, strict=False):
        tokens = [
            TokenView(
                text=token_text(ids[at], tokenizer),
                id=ids[at],
                position=positions[at],
                has_loss=labels[at] != IGNORE_INDEX,
            )
            for at in range(start, end)
        ]
        source, row = dataset.documents.locate(index)
        outcome, num_truncated_tokens = dataset.documents.outcome_of(index)
        views.append(
            DocumentView(
                index=row,
                source=dataset.description[source]["name"],
                outcome=outcome.name.lower(),
                num_truncated_tokens=num_truncated_tokens,
                tokens=tokens,
            )
        )
    return views


def token_text(token: int, tokenizer: Any) -> str:
    """Return a token's text, or its bytes as <E2><82> if it is not a whole character."""
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    if "\ufffd" not in text:
        return text
    raw = tokenizer.convert_ids_to_tokens(token)
    if isinstance(raw, str) and all(character in _BYTES for character in raw):
        return "".join(f"<{_BYTES[character]:02X}>" for character in raw)
    return str(raw)


def totals_of(dataset: PackedDataset) -> Epoch:
    """Return the totals of the dataset's first epoch."""
    sampler = dataset.sampler
    return Epoch(
        num_documents=dataset.num_documents,
        num_tokens=dataset.documents.num_tokens,
        num_loss_tokens=dataset.documents.count_loss_tokens(),
        num_packs=sampler.num_packs(0),
        num_batches=len(sampler),
        batch_packs=sampler.batch_packs * sampler.num_replicas,
        capacity=sampler.capacity,
        max_seq_len=dataset.collator.max_seq_len,
        longest=dataset.documents.longest,
    )
