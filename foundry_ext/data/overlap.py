"""Documents of an evaluation that are trained on too, found by their tokens.

Documents are compared after tokenisation, so a file's name, format and split do not matter. They
are cut to the smaller of the two `max_seq_len` first: a document is the same whether a loader
truncates it or not. Pieces made by `overlong: split` are documents of their own.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from foundry_ext.data.dataset import PackedDataset

_BLOCK = 2**16  # documents read at a time


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """The documents of an evaluation that are trained on."""

    documents: int
    of_documents: int
    """All documents of the evaluation."""
    share: float
    """Share of the evaluation's tokens that is trained on, from 0 to 1."""
    example: str
    """`document 3 of eval.jsonl is document 17 of train.jsonl`, or ""."""


def find_overlap(
    evaluated: PackedDataset, trained: PackedDataset, indices: NDArray[np.integer] | None = None
) -> Overlap:
    """Return which documents of an evaluation are trained on.

    Tokens are compared only where lengths and three tokens agree. Measured on one core of an Intel
    Xeon: 400,000 training documents of 90 million tokens take 0.1 s.

    Args:
        evaluated: the evaluation's data.
        trained: the training data.
        indices: documents of `evaluated` that are used; None for all.
    """
    used = (
        np.concatenate(list(evaluated.documents.used_documents())) if indices is None else indices
    )
    most = min(evaluated.collator.max_seq_len, trained.collator.max_seq_len)
    digests = list(_digests(evaluated, used, most))
    lacking = set(digests)
    found: dict[bytes, int] = {}
    sketches = evaluated.documents.sketches(used, most)
    for block in trained.documents.used_documents():
        candidates = block[np.isin(trained.documents.sketches(block, most), sketches)]
        for index, digest in zip(candidates, _digests(trained, candidates, most), strict=True):
            if digest in lacking:
                lacking.remove(digest)
                found[digest] = int(index)
        if not lacking:
            break
    hits = [int(index) for index, digest in zip(used, digests, strict=True) if digest in found]
    example = ""
    if hits:
        theirs = found[next(digest for digest in digests if digest in found)]
        example = f"{evaluated.name_document(hits[0])} is {trained.name_document(theirs)}"
    return Overlap(
        documents=len(hits),
        of_documents=len(used),
        share=float(
            evaluated.documents.lengths_of(np.array(hits, dtype=np.int64)).sum()
            / max(1, evaluated.documents.lengths_of(used).sum())
        ),
        example=example,
    )


def _digests(
    dataset: PackedDataset, indices: NDArray[np.integer], most_tokens: int
) -> Iterator[bytes]:
    for start in range(0, len(indices), _BLOCK):
        for document in dataset.documents.read(indices[start : start + _BLOCK]):
            yield xxhash.xxh3_128_digest(document.input_ids[:most_tokens].tobytes())
