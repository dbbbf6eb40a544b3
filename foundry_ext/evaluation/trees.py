"""Layout of documents as trees, which compute a common prefix once; models/shared_prefix.py."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from foundry_ext.evaluation.scoring import Shard
from foundry_ext.models.shared_prefix import TreePack, score_trees
from foundry_ext.models.smollm2 import SmolLM2ForCausalLM
from foundry_ext.packing.algorithm import pack
from foundry_ext.packing.collator import Document


def common_prefix(documents: Sequence[Document]) -> int:
    """Return how many first tokens all documents have in common, without their last tokens.

    Nothing is predicted from a document's last token, so it is never laid out.

    Example: `5 6 7` and `5 6 7 8` have 2 in common.
    """
    least = min(len(document.input_ids) for document in documents) - 1
    first = documents[0].input_ids[:least]
    for document in documents[1:]:
        differs = first != document.input_ids[: len(first)]
        if differs.any():
            first = first[: int(differs.argmax())]
    return len(first)


def num_laid_out(documents: Sequence[Document]) -> int:
    """Return the tokens of the documents laid out as one tree."""
    prefix = common_prefix(documents)
    return prefix + sum(len(document.input_ids) - 1 - prefix for document in documents)


@dataclass(frozen=True)
class Forest:
    """Trees of documents, and the packs that they fill."""

    trees: Sequence[Sequence[int]]
    """Indices of each tree's documents."""
    packs: Sequence[Sequence[int]]
    """Indices of each pack's trees."""


def plant(groups: Sequence[Sequence[int]], documents: Sequence[Document], capacity: int) -> Forest:
    """Make trees of groups of documents, and packs of at most `capacity` laid-out tokens.

    A group is one tree if its documents have a prefix in common and fit into a pack; otherwise each
    document is a tree of its own.
    """
    trees, sizes = [], []
    for group in groups:
        members = [documents[index] for index in group]
        size = num_laid_out(members)
        if common_prefix(members) > 0 and size <= capacity:
            trees.append(list(group))
            sizes.append(size)
        else:
            trees += [[index] for index in group]
            sizes += [len(document.input_ids) - 1 for document in members]
    packs = pack(sizes, capacity, seed=0, epoch=0)
    return Forest(trees, [list(chosen) for chosen in packs])


def score_forest(
    model: SmolLM2ForCausalLM,
    documents: Sequence[Document],
    forest: Forest,
    *,
    name: str,
    shard: Shard,
) -> Iterator[tuple[int, float]]:
    """Yield (index, summed log-probability in nats) of each document in this rank's packs."""
    for number in shard.progress(len(forest.packs), name, unit="packs"):
        trees = [forest.trees[tree] for tree in forest.packs[number]]
        laid_out = lay_out([[documents[index] for index in tree] for tree in trees])
        sums = score_trees(model, laid_out.to(model.device)).tolist()
        yield from zip((index for tree in trees for index in tree), sums, strict=True)


def lay_out(trees: Sequence[Sequence[Document]]) -> TreePack:
    """Lay trees end to end; documents are numbered in the order in which they are given.

    Each document has two tokens or more, and its first has no loss. The documents of a tree have a
    prefix in common, see `plant`.
    """
    ids, positions, bounds = [], [], []
    states, targets, numbers = [], [], []
    end = num_documents = 0
    for documents in trees:
        start, prefix = end, common_prefix(documents)
        ids.append(documents[0].input_ids[:prefix])
        positions.append(np.arange(prefix))
        end += prefix
        tree = [start, end]
        for document in documents:
            length = len(document.input_ids) - 1
            scored = np.flatnonzero(document.loss_mask)
            # The state before a scored token is in the prefix, which starts at `start`, or in the
            # branch, whose position `prefix` is laid out at `end`.
            before = scored - 1
            states.append(np.where(before < prefix, start + before, end - prefix + before))
            targets.append(document.input_ids[scored])
            numbers.append(np.full(len(scored), num_documents))
            ids.append(document.input_ids[prefix:length])
            positions.append(np.arange(prefix, length))
            end += length - prefix
            tree.append(end)
            num_documents += 1
        bounds.append(tuple(tree[: 2 if len(documents) == 1 else None]))
    input_ids, position_ids, state_places, target_ids, document = (
        torch.from_numpy(np.concatenate(parts).astype(np.int64))
        for parts in (ids, positions, states, targets, numbers)
    )
    return TreePack(
        input_ids, position_ids, bounds, state_places, target_ids, document, num_documents
    )
