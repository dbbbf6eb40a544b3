"""Properties for any lengths of documents.

Each document is used once, in order and within capacity. Its tokens and labels come back out. Any
batch can be the first.
"""

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
import torch

pytest.importorskip("hypothesis", reason="run `make install`")

import datasets
from hypothesis import given
from hypothesis import strategies as st

from foundry_ext.data.dataset import PackedDataLoader, PackedDataset
from foundry_ext.data.documents import Documents
from foundry_ext.data.mixture import MixedDocuments, draw
from foundry_ext.data.row_outcome import RowOutcome
from foundry_ext.data.table import Record, Tokens, to_records, to_table
from foundry_ext.packing.algorithm import most_documents, pack
from foundry_ext.packing.batch import (
    join_packs,
    num_documents,
    num_tokens,
    split_batch,
)
from foundry_ext.packing.collator import PackCollator
from foundry_ext.utils.constants import IGNORE_INDEX
from tests.data.kit import document, split_documents
from tests.properties import examples

LONGEST = 12
SEEDS = st.integers(0, 2**31)
WINDOWS = st.sampled_from([1, 2, 5, 2**17])


@st.composite
def lengths_and_capacity(draw, least: int = 1):
    capacity = draw(st.sampled_from([1, 2, 7, 12, 64, 70_000]))
    # Few distinct lengths, some at the very limits, are what greedy packing finds hardest.
    length = st.one_of(
        st.integers(1, capacity), st.sampled_from([1, capacity, capacity // 2 + 1, capacity // 3])
    ).filter(bool)
    return draw(st.lists(length, min_size=least, max_size=60)), capacity


@st.composite
def documents_of(draw, least: int = 0, most: int = 30):
    """Return documents whose tokens are all different, so that none is mistaken for another."""
    lengths = draw(st.lists(st.integers(1, LONGEST), min_size=least, max_size=most))
    prompts = draw(st.lists(st.integers(0, LONGEST), min_size=most, max_size=most))
    ends = np.cumsum([0, *lengths])
    return [
        document(range(int(start), int(end)), prompt=prompt)
        for (start, end), prompt in zip(pairwise(ends), prompts, strict=False)
    ]


def first_fit_decreasing(lengths, capacity: int) -> int:
    """Return the number of packs, placing one document at a time."""
    gaps: list[int] = []
    for length in sorted(lengths, reverse=True):
        place = next((i for i, gap in enumerate(gaps) if gap >= length), None)
        if place is None:
            gaps.append(capacity)
            place = -1
        gaps[place] -= length
    return len(gaps)


# --- packing -------------------------------------------------------------------------------------


@examples(400)
@given(lengths_and_capacity(least=0), SEEDS, st.integers(0, 9), WINDOWS)
def test_packs_are_a_partition_within_capacity(case, seed, epoch, window):
    lengths, capacity = case
    packs = pack(lengths, capacity, seed=seed, epoch=epoch, window=window)
    content = [one.tolist() for one in packs]
    assert sorted(index for one in content for index in one) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in one) <= capacity for one in content)
    assert packs.num_tokens == sum(lengths)
    again = pack(np.array(lengths, np.int32), capacity, seed=seed, epoch=epoch, window=window)
    assert [one.tolist() for one in again] == content
    if lengths:
        most = most_documents(np.array(lengths), capacity)
        assert max(map(len, content)) <= most


@examples(300)
@given(lengths_and_capacity(), SEEDS)
def test_no_more_packs_than_first_fit_decreasing(case, seed):
    """The limit, 1.001 times as many, allows no extra pack below a thousand packs."""
    lengths, capacity = case
    packs = pack(lengths, capacity, seed=seed, epoch=0)
    assert -(-sum(lengths) // capacity) <= len(packs) <= first_fit_decreasing(lengths, capacity)


# --- collating, joining, splitting ---------------------------------------------------------------


@examples(200)
@given(documents_of(), st.booleans(), st.integers(0, 3), st.booleans())
def test_a_pack_gives_its_documents_back(documents, fixed_shape, pad, tight):
    total = sum(len(one.input_ids) for one in documents)
    collate = PackCollator(
        max_seq_len=LONGEST,
        pack_tokens=max(total + (0 if tight else 2 * LONGEST), 1),
        pad_token_id=pad,
        fixed_shape=fixed_shape,
        max_documents=max(len(documents), 1) if tight else None,
    )
    check_pack(collate(documents), documents)


def check_pack(found, documents):
    assert split_documents(found) == [one.input_ids.tolist() for one in documents]
    expected = [
        [
            token if flag and at > 0 else IGNORE_INDEX
            for at, (token, flag) in enumerate(zip(one.input_ids, one.loss_mask, strict=True))
        ]
        for one in documents
    ]
    assert split_documents(found, "labels") == expected
    lengths = [len(one.input_ids) for one in documents]
    assert split_documents(found, "position_ids") == [list(range(length)) for length in lengths]
    ends, slots = found["cu_seqlens"], found["input_ids"].shape[1]
    assert (int(ends[0]), int(ends[-1])) == (0, slots)
    assert int(ends.diff().min()) >= 0 and int(ends.diff().max()) <= LONGEST
    assert (found["labels"][0, sum(lengths) :] == IGNORE_INDEX).all()
    assert (found["num_documents"], found["num_tokens"]) == (len(documents), sum(lengths))
    assert found["num_loss_tokens"] == int((found["labels"] != IGNORE_INDEX).sum())
    assert found["sum_squared_lengths"] == sum(length**2 for length in lengths)


@examples(150)
@given(st.lists(documents_of(most=6), min_size=1, max_size=7), st.integers(1, 9), st.booleans())
def test_microbatches_hold_the_batchs_documents_in_order(groups, size, fixed_shape):
    collate = PackCollator(max_seq_len=LONGEST, pack_tokens=6 * LONGEST, fixed_shape=fixed_shape)
    batch = [collate(documents) for documents in groups]
    parts = split_batch(batch, size)
    assert len(parts) == -(-len(batch) // size)
    for part, first in zip(parts, range(0, len(batch), size), strict=True):
        packs = batch[first : first + size]
        for key in ("input_ids", "labels", "position_ids"):
            assert part[key].tolist() == torch.cat([one[key] for one in packs], dim=1).tolist()
        ends = part["cu_seqlens"]
        assert int(ends[-1]) == part["input_ids"].shape[1] and int(ends.diff().min()) >= 0
        # A document begins where its positions do, so an end that was not rebased shows.
        starts = ends[:-1][ends.diff() > 0].long()
        assert starts.tolist() == (part["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert num_documents(parts) == num_documents(batch) == sum(map(len, groups))
    assert num_tokens(parts) == num_tokens(batch)
    assert join_packs(parts)["input_ids"].tolist() == join_packs(batch)["input_ids"].tolist()


# --- rows to documents ---------------------------------------------------------------------------

FLAGS = st.lists(st.booleans(), max_size=40)


@examples(300)
@given(FLAGS, st.integers(2, 15), st.sampled_from(["truncate", "split", "drop"]))
def test_tokens_of_a_row_are_kept_in_order_or_counted(flags, limit, overlong):
    ids = np.arange(len(flags), dtype=np.int32)
    records = list(to_records(0, Tokens(ids, np.array(flags, bool)), limit, overlong))
    kept = np.concatenate([one.tokens.input_ids for one in records])
    loss_mask = np.concatenate([one.tokens.loss_mask for one in records])
    assert len(kept) + sum(one.num_truncated_tokens for one in records) == len(ids)
    assert (np.diff(kept) > 0).all(), "in order, none twice"
    assert loss_mask.tolist() == [flags[token] for token in kept], "each with its own flag"
    for one in records:
        assert len(one.tokens.input_ids) <= limit
        dropped = one.outcome >= RowOutcome.DROPPED_OVERLONG
        assert dropped == (len(one.tokens.input_ids) == 0)
        assert dropped or one.tokens.loss_mask[1:].any(), "something of it can be learned"


def in_memory(documents) -> Documents:
    """Return documents as the tokeniser writes them, in several chunks of two rows each."""
    records = [Record(Tokens(one.input_ids, one.loss_mask), RowOutcome.KEPT) for one in documents]
    tables = [
        to_table(records[at : at + 2], with_responses=True) for at in range(0, len(records), 2)
    ]
    return Documents(datasets.Dataset(pa.concat_tables(tables), info=_INFO))


_INFO = datasets.DatasetInfo()


@examples(100)
@given(documents_of(least=1), st.data())
def test_any_documents_are_found(documents, data):
    table = in_memory(documents)
    places = st.lists(st.integers(0, len(documents) - 1), max_size=8)
    indices = np.array(data.draw(places), dtype=np.int64)
    for index, found in zip(indices, table.read(indices), strict=True):
        assert found.input_ids.tolist() == documents[index].input_ids.tolist()
        assert found.loss_mask.tolist() == documents[index].loss_mask.tolist()


@examples(100)
@given(documents_of(least=1), documents_of(least=1), st.floats(0.01, 0.9))
def test_a_share_is_met_to_within_a_document(main, other, share):
    sources = [in_memory(main), in_memory(other)]
    parts = draw(sources, [None, share])
    whole, drawn = (part.describe()["tokens"] for part in parts)
    wanted = whole * share / (1 - share)
    assert whole == sources[0].lengths.sum()
    assert wanted - 1e-6 <= drawn < wanted + LONGEST + 1e-6
    times = np.bincount(parts[1].chosen, minlength=len(other))
    assert times.max() - times.min() <= 1, "none a second time before all have been used"
    mixed = MixedDocuments(parts)
    for index in range(len(mixed)):
        part = parts[int(mixed.source[index])]
        expected = part.documents[int(mixed._row[index])].input_ids
        assert mixed[index].input_ids.tolist() == expected.tolist()


# --- resuming ------------------------------------------------------------------------------------


class Lengths(Documents):
    """Stand-in for documents with lengths only."""

    def __init__(self, lengths):
        self.lengths = np.array(lengths, dtype=np.int32)
        self.fingerprint = "lengths"


def dataset_of(lengths, capacity, batch_packs, rank, world_size, seed, shuffle) -> PackedDataset:
    settings = {"capacity": capacity, "shuffle": shuffle, "seed": seed}
    settings |= {"batch_packs": batch_packs, "rank": rank, "world_size": world_size}
    collator = PackCollator(max_seq_len=capacity, pack_tokens=capacity)
    return PackedDataset(Lengths(lengths), collator, settings)


def walk(dataset: PackedDataset, epoch: int) -> list[list[list[int]]]:
    dataset.sampler.set_epoch(epoch)
    return [[one.tolist() for one in batch] for batch in dataset.sampler]


def of_all_ranks(datasets_of_ranks, epoch: int) -> list[list[list[int]]]:
    """Return global batches: the packs of all ranks in turn."""
    batches = [walk(dataset, epoch) for dataset in datasets_of_ranks]
    assert len({len(one) for one in batches}) == 1, "a rank would wait for ever"
    return [
        [one for packs in zip(*ranks, strict=True) for one in packs]
        for ranks in zip(*batches, strict=True)
    ]


WAYS = [(12 // ranks, ranks) for ranks in (1, 2, 3, 4, 6, 12)]  # packs a rank, ranks


@examples(150)
@given(
    lengths_and_capacity(),
    st.sampled_from(WAYS),
    st.sampled_from(WAYS),
    SEEDS,
    st.booleans(),
    st.integers(0, 3),
    st.data(),
)
def test_stopped_at_any_batch_the_rest_is_the_same_on_any_ranks(
    case, before, after, seed, shuffle, epoch, data
):
    lengths, capacity = case
    lengths = [*lengths, 0]  # a row that was dropped

    def ranks(way):
        return [
            dataset_of(lengths, capacity, way[0], rank, way[1], seed, shuffle)
            for rank in range(way[1])
        ]

    whole = of_all_ranks(ranks(before), epoch)
    used = sorted(index for batch in whole for one in batch for index in one)
    assert used == np.flatnonzero(lengths).tolist(), "every document once"
    batch = data.draw(st.integers(0, len(whole)), label="stopped after")
    stopped = ranks(before)[0]
    stopped.epoch, stopped.next_batch = epoch, batch
    resumed = ranks(after)
    state = stopped.state_dict()
    for dataset in resumed:
        dataset.load_state_dict(state)
    assert of_all_ranks(resumed, epoch) == whole[batch:]
    next_epoch = of_all_ranks(ranks(before), epoch + 1)
    assert of_all_ranks(resumed, epoch + 1) == next_epoch
    # Stopped at an epoch's end, Composer's clock may be in the next one already.
    further = ranks(after)
    for dataset in further:
        dataset.load_state_dict(state)
    assert of_all_ranks(further, epoch + 1) == next_epoch


@examples(40)
@given(documents_of(least=1, most=20), st.integers(1, 3), SEEDS, st.integers(0, 2), st.data())
def test_tokens_come_through_a_loader_that_was_stopped(documents, size, seed, epoch, data):
    """Every document's tokens come once, whichever batch the loader was stopped at."""
    settings = {"capacity": 2 * LONGEST, "shuffle": True, "seed": seed}
    settings |= {"batch_packs": size, "rank": 0, "world_size": 1}
    collator = PackCollator(max_seq_len=LONGEST, pack_tokens=2 * LONGEST)

    def loader() -> PackedDataLoader:
        found = PackedDataLoader(PackedDataset(in_memory(documents), collator, settings))
        found.dataset.sampler.set_epoch(epoch)
        return found

    first, second = loader(), loader()
    stop = data.draw(st.integers(1, len(first)), label="stopped after")
    seen = []
    for number, batch in enumerate(first, start=1):
        seen += batch
        if number == stop:
            break
    state = first.dataset.state_dict()
    assert (state["epoch"], state["batch"]) == (epoch, stop)
    second.dataset.load_state_dict(state)
    for batch in second:
        seen += batch
    found = [one for pack in seen for one in split_documents(pack)]
    assert sorted(found) == sorted(one.input_ids.tolist() for one in documents)
    assert second.dataset.state_dict()["epoch"] == epoch + 1
