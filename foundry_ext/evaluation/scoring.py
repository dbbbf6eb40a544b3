"""Scores of documents, computed in packs that the ranks share."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from foundry_ext.models.scores import BaseStates, score_pack
from foundry_ext.models.smollm2 import SmolLM2ForCausalLM
from foundry_ext.packing.algorithm import pack
from foundry_ext.packing.batch import Pack
from foundry_ext.utils.progress import progress

_TENSORS = ("input_ids", "position_ids", "labels", "cu_seqlens")


class Shard(NamedTuple):
    """This process's part of a measurement; ranks take packs, or batches, in turn."""

    rank: int = 0
    world_size: int = 1

    def of(self, count: int) -> range:
        """Return this process's part of the indices 0 to count - 1."""
        return range(self.rank, count, self.world_size)

    def progress(self, count: int, name: str, *, unit: str) -> Iterator[int]:
        """Yield this process's part; the first rank shows the progress of its own."""
        part = self.of(count)
        return progress(part, f"measuring {name}", total=len(part), unit=unit, shown=self.rank == 0)


class DocumentScore(NamedTuple):
    """Score of one document, summed over its labelled tokens."""

    index: int
    """Index that the caller gave the document."""
    log_prob: float
    """Nats."""
    num_tokens: int
    """Labelled tokens."""
    kl: float | None
    """KL(base || model) in nats; None without a base model."""


def score_documents(
    model: SmolLM2ForCausalLM,
    indices: NDArray[np.int64],
    lengths: NDArray[np.int64],
    make_pack: Callable[[Sequence[int]], Pack],
    *,
    name: str,
    capacity: int,
    base: BaseStates | None,
    shard: Shard,
) -> Iterator[DocumentScore]:
    """Yield the scores of this rank's documents.

    `indices` [n] are the documents and `lengths` [n] their tokens, each at most `capacity`. Packs
    depend on these only, not on the number of ranks, so a document is always computed together with
    the same others and rounds alike. `make_pack` lays documents end to end. Progress is shown under
    `name`.
    """
    device = model.device
    plan = pack(lengths, capacity, seed=0, epoch=0)
    for pack_index in shard.progress(len(plan), name, unit="packs"):
        documents = [int(index) for index in indices[plan[pack_index]]]
        batch = make_pack(documents)
        tensors = {key: batch[key].to(device) for key in _TENSORS}
        scores = score_pack(model, base=base, max_seqlen=batch["max_seqlen"], **tensors)
        for row, index in enumerate(documents):
            yield DocumentScore(
                index,
                float(scores.log_prob[row]),
                int(scores.num_tokens[row]),
                None if scores.kl is None else float(scores.kl[row]),
            )


def evenly_spaced(count: int, at_most: int | None) -> NDArray[np.int64]:
    """Return at most `at_most` indices below `count`, evenly spaced with first and last included.

    Example: 3 of 5 are 0 2 4. None returns all.
    """
    if at_most is None or at_most >= count:
        return np.arange(count)
    return np.linspace(0, count - 1, at_most).round().astype(np.int64)
