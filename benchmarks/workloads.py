"""The documents of one optimizer step, and the batches that each system makes of them.

Lengths are log-normal, clipped at 16 and 2048, token ids random, all seeds fixed. Whatever the
batch, it holds the same documents, and only these count as tokens.

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
# Padding's fill in the two cases that earlier figures are of. Documents of distribution a, eight at
# a time, fill rows less than this on average, so these favour padding.
FILL_LONGEST, FILL_2048 = 0.66, 0.39
_POOL = 20_000  # documents that packs are made of, so that they are as full as in a data set

Batch = dict[str, Tensor | int]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What one step is made of."""

    name: str
    documents: Sequence[Document]
    pack_tokens: int
    """Capacity of a pack, tokens."""
    packs: Sequence[Sequence[int]] | None = None
    """Documents of each pack, by their place; None to pack them here."""
    microbatches: tuple[int, ...]
    """Rows of a padded microbatch to choose the fastest from; one where the case itself says it."""
    max_seq_len: int = LONGEST
    """Tokens no document exceeds."""
    pad_to: int | None = None
    """Slots of a padded row; None for the longest of its microbatch."""

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
    """Random documents; the last `labelled` (0 to 1) of each has labels, its first token never."""
    generator = np.random.default_rng(0)
    made = []
    for length in lengths:
        ids = generator.integers(vocabulary, size=length)
        num_labels = min(round(length * labelled), length - 1)
        made.append(Document(ids, np.arange(length) >= length - num_labels))
    return made


def draw_lengths(name: str, count: int, *, fill: float, pad_to: int | None) -> list[int]:
    """Lengths from the named distribution whose padded batch is `fill` full.

    Fill decides the ratio more than anything else, and of 8 documents it scatters from .2 to .8, so
    of a thousand draws the one nearest to the wanted fill is taken.

    Args:
        pad_to: slots a row has; None for the longest document.
    """
    median, sigma = LENGTHS[name]
    draw = np.random.default_rng(0).lognormal(np.log(median), sigma, (1000, count))
    lengths = draw.clip(16, LONGEST).astype(int)
    fills = lengths.mean(1) / (lengths.max(1) if pad_to is None else pad_to)
    return lengths[np.abs(fills - fill).argmin()].tolist()


def named_case(name: str, *, vocabulary: int, labelled: float, count: int) -> Workload:
    """ "longest": `count` documents padded to the longest at 66 % fill; "to2048": at 39 %.

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
    """The documents of `num_packs` packs out of a data set of distribution `name`.

    Packs of so few documents alone would be less full than those of a data set; the documents come
    in an order that knows nothing of the packs.
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
    """Documents in their order, `rows` at a time: ids, labels, mask [B, S], padded on the right."""
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
    """A microbatch a pack, as the project's loader makes it."""
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
    """The same packs in the arguments of transformers' padding-free path (FlashAttentionKwargs)."""
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
    """Places for tokens in all batches, filled or not."""
    return sum(batch["input_ids"].numel() for batch in batches)  # pyright: ignore
