"""The documents of one optimizer step, and the batches that each system makes of them.

Lengths are log-normal, clipped at 16 and 2048. Token ids are random, and all seeds are fixed. Every
kind of batch holds the same documents, and only their tokens count.

D documents, T tokens, B rows of S slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from foundry_ext.packing.algorithm import most_documents, pack
from foundry_ext.packing.collator import Document, PackCollator

# Medians and sigmas of log-normal lengths: instruction tuning, code, chat.
LENGTHS = {"a": (350, 0.9), "b": (600, 1.4), "c": (80, 0.7)}
LONGEST = 2048
# Padding's fill in the two cases of earlier figures. Eight documents of distribution a fill rows
# less than this on average, so these cases favour padding.
FILL_LONGEST, FILL_2048 = 0.66, 0.39
_POOL = 20_000  # documents to pack; enough for packs as full as a data set's

Batch = dict[str, Tensor | int]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The documents of one step, and how they are batched."""

    name: str
    documents: Sequence[Document]
    pack_tokens: int
    """Capacity of a pack, tokens."""
    packs: Sequence[Sequence[int]] | None = None
    """Indices of each pack's documents; None to pack them here."""
    microbatches: tuple[int, ...]
    """Row counts of padded microbatches to choose the fastest from; one if the case fixes it."""
    max_seq_len: int = LONGEST
    """Most tokens of a document."""
    pad_to: int | None = None
    """Slots of a padded row; None for the longest document of its microbatch."""

    @property
    def num_tokens(self) -> int:
        return sum(len(document.input_ids) for document in self.documents)

    @property
    def num_loss_tokens(self) -> int:
        return sum(int(document.loss_mask[1:].sum()) for document in self.documents)

    @property
    def sum_squared_lengths(self) -> int:
        return sum(len(document.input_ids) ** 2 for document in self.documents)


def make_documents(lengths: Sequence[int], *, vocabulary: int, labelled: float) -> list[Document]:
    """Make random documents; the last share `labelled` of each has labels, a first token never."""
    generator = np.random.default_rng(0)
    made = []
    for length in lengths:
        ids = generator.integers(vocabulary, size=length)
        num_labels = min(round(length * labelled), length - 1)
        made.append(Document(ids, np.arange(length) >= length - num_labels))
    return made


def draw_lengths(name: str, count: int, *, fill: float, pad_to: int | None) -> list[int]:
    """Draw lengths from the named distribution whose padded batch is `fill` full.

    Fill affects the ratio more than anything else, and with 8 documents it ranges from .2 to .8.
    Therefore the draw with the fill nearest to the wanted one is chosen from a thousand.

    Args:
        pad_to: slots per row; None for the longest document.
    """
    median, sigma = LENGTHS[name]
    draw = np.random.default_rng(0).lognormal(np.log(median), sigma, (1000, count))
    lengths = draw.clip(16, LONGEST).astype(int)
    fills = lengths.mean(1) / (lengths.max(1) if pad_to is None else pad_to)
    return lengths[np.abs(fills - fill).argmin()].tolist()


def named_case(name: str, *, vocabulary: int, labelled: float, count: int) -> Workload:
    """Return `count` documents, padded to the longest at 66 % fill or, for "to2048", at 39 %.

    All of them are one microbatch and one pack.
    """
    pad_to = LONGEST if name == "to2048" else None
    fill = FILL_LONGEST if pad_to is None else FILL_2048
    lengths = draw_lengths("a", count, fill=fill, pad_to=pad_to)
    return Workload(
        name=f"{name}, {count} documents",
        documents=make_documents(lengths, vocabulary=vocabulary, labelled=labelled),
        pack_tokens=sum(lengths),
        microbatches=(count,),
        pad_to=pad_to,
    )


def packed_workload(
    name: str,
    *,
    vocabulary: int,
    labelled: float,
    pack_tokens: int,
    num_packs: int,
    microbatches: tuple[int, ...],
) -> Workload:
    """Return the documents of `num_packs` packs from a data set with distribution `name`.

    They are packed with a large pool, because packs of so few documents alone would be less full
    than those of a data set. Their order is independent of the packs.
    """
    median, sigma = LENGTHS[name]
    generator = np.random.default_rng(0)
    longest = min(LONGEST, pack_tokens)
    pool = generator.lognormal(np.log(median), sigma, _POOL).clip(16, longest).astype(int)
    packs = pack(pool, pack_tokens, seed=0, epoch=0)
    chosen = [packs[i] for i in range(min(num_packs, len(packs)))]
    order = generator.permutation(np.concatenate(chosen))
    place = {document: index for index, document in enumerate(order.tolist())}
    lengths = pool[order].tolist()
    return Workload(
        name=f"{name}, {num_packs} x {pack_tokens}",
        documents=make_documents(lengths, vocabulary=vocabulary, labelled=labelled),
        pack_tokens=pack_tokens,
        packs=[[place[document] for document in members.tolist()] for members in chosen],
        microbatches=tuple(sorted({min(size, len(lengths)) for size in microbatches})),
    )


def padded_batches(workload: Workload, rows: int) -> list[Batch]:
    """Pad `rows` documents at a time on the right: ids, labels, mask [B, S]."""
    batches = []
    for start in range(0, len(workload.documents), rows):
        documents = workload.documents[start : start + rows]
        slots = workload.pad_to or max(len(document.input_ids) for document in documents)
        parts = [_padded_row(document, slots) for document in documents]
        ids, labels, mask = (torch.stack(part) for part in zip(*parts, strict=True))
        batches.append({"input_ids": ids, "labels": labels, "attention_mask": mask})
    return batches


def _padded_row(document: Document, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.from_numpy(np.asarray(document.input_ids, dtype=np.int64))
    labels = ids.where(torch.from_numpy(document.loss_mask), -100)
    labels[0] = -100
    padding = (0, slots - len(ids))
    return F.pad(ids, padding), F.pad(labels, padding, value=-100), F.pad(ids * 0 + 1, padding)


def packed_batches(workload: Workload, *, fixed_shape: bool = False) -> list[Batch]:
    """Return one microbatch per pack, as the project's loader makes it."""
    lengths = [len(document.input_ids) for document in workload.documents]
    collate = PackCollator(
        max_seq_len=min(workload.max_seq_len, workload.pack_tokens),
        pack_tokens=workload.pack_tokens,
        fixed_shape=fixed_shape,
        max_documents=most_documents(np.array(lengths), workload.pack_tokens),
    )
    packed = pack(lengths, workload.pack_tokens, seed=0, epoch=0)
    packs = workload.packs or [packed[i] for i in range(len(packed))]
    keys = ("input_ids", "labels", "position_ids", "cu_seqlens", "max_seqlen", "num_loss_tokens")
    made = (collate([workload.documents[index] for index in members]) for members in packs)
    return [{key: batch[key] for key in keys} for batch in made]


def flattened_batches(workload: Workload) -> list[Batch]:
    """Return the same packs as arguments of transformers' padding-free path."""
    return [
        {
            **{key: batch[key] for key in ("input_ids", "labels", "position_ids")},
            "cu_seq_lens_q": batch["cu_seqlens"],
            "cu_seq_lens_k": batch["cu_seqlens"],
            "max_length_q": batch["max_seqlen"],
            "max_length_k": batch["max_seqlen"],
        }
        for batch in packed_batches(workload)
    ]


def num_computed_tokens(batches: Sequence[Batch]) -> int:
    """Return the number of token slots in all batches, filled or not."""
    return sum(batch["input_ids"].numel() for batch in batches)  # pyright: ignore
