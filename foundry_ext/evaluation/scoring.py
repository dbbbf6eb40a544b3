"""Documents scored in packs, each rank its share of them."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from foundry_ext.models.scores import BaseModel, score_pack
from foundry_ext.models.smollm2 import SmolLM2ForCausalLM
from foundry_ext.packing.algorithm import pack
from foundry_ext.packing.batch import Pack


class Shard(NamedTuple):
    """Which part of a measurement is this process's: ranks take packs, or batches, in turn."""

    rank: int = 0
    world_size: int = 1

    def of(self, count: int) -> range:
        return range(self.rank, count, self.world_size)


class DocumentScore(NamedTuple):
    """One document: summed nats of its labelled tokens, their number, and KL(base || now), summed,
    where a base model was given. `index` is the caller's."""

    index: int
    log_prob: float
    num_tokens: int
    kl: float | None


def score_documents(
    model: SmolLM2ForCausalLM,
    indices: NDArray[np.int64],
    lengths: NDArray[np.int64],
    make_pack: Callable[[Sequence[int]], Pack],
    *,
    capacity: int,
    base: BaseModel | None,
    shard: Shard,
) -> Iterator[DocumentScore]:
    """Scores this rank's share of documents, which `make_pack` lays end to end.

    The packs depend on lengths and capacity alone, never on the number of ranks, so that a document
    is computed in the same company everywhere.

    Args:
        indices, lengths: [n], the documents to score and their tokens.
        capacity: tokens a pack may hold; no document is longer.
    """
    device = model.device
    plan = pack(lengths, capacity, seed=0, epoch=0)
    for number in shard.of(len(plan)):
        chosen = [int(index) for index in indices[plan[number]]]
        made = make_pack(chosen)
        scores = score_pack(
            model,
            input_ids=made["input_ids"].to(device),
            position_ids=made["position_ids"].to(device),
            labels=made["labels"].to(device),
            cu_seqlens=made["cu_seqlens"].to(device),
            max_seqlen=made["max_seqlen"],
            base=base,
        )
        for place, index in enumerate(chosen):
            yield DocumentScore(
                index,
                float(scores.log_prob[place]),
                int(scores.num_tokens[place]),
                None if scores.kl is None else float(scores.kl[place]),
            )


def evenly_spaced(count: int, at_most: int | None) -> NDArray[np.int64]:
    """`at_most` of `count` places, first and last among them; all where there are no more.

    Example: 3 of 5 are 0 2 4.
    """
    if at_most is None or at_most >= count:
        return np.arange(count)
    return np.linspace(0, count - 1, at_most).round().astype(np.int64)
