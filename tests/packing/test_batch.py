"""Microbatches: cut between packs, with offsets that fit and counts that add up."""

import numpy as np
import pytest
import torch

from foundry_ext.packing.batch import (
    join_packs,
    num_documents,
    num_tokens,
    split_batch,
)
from foundry_ext.packing.collator import PackCollator
from foundry_ext.utils.constants import IGNORE_INDEX
from tests.data.kit import MAX_SEQ_LEN, document, random_packs, split_documents

TENSORS = ("input_ids", "position_ids", "labels")


def test_worked_example_of_joining():
    collate = PackCollator(max_seq_len=8, pack_tokens=8)
    first = collate([document([5, 6, 7]), document([8, 9])])
    second = collate([document([1, 2])])
    joined = join_packs([first, second])
    assert joined["input_ids"].tolist() == [[5, 6, 7, 8, 9, 1, 2]]
    assert joined["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    ignored = IGNORE_INDEX
    assert joined["labels"].tolist() == [[ignored, 6, 7, ignored, 9, ignored, 2]]
    assert joined["cu_seqlens"].tolist() == [0, 3, 5, 7]
    assert (joined["num_documents"], joined["num_tokens"], joined["num_loss_tokens"]) == (3, 7, 4)
    assert joined["sum_squared_lengths"] == 9 + 4 + 4
    assert joined["max_seqlen"] == 8


@pytest.mark.parametrize("fixed_shape", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8, 100, 2.0])
def test_a_microbatch_is_whole_packs(size, fixed_shape: bool):
    packs = random_packs(7, fixed_shape=fixed_shape)
    microbatches = split_batch(packs, size)
    step = int(size)
    assert len(microbatches) == -(-len(packs) // step)
    for i, microbatch in enumerate(microbatches):
        members = packs[i * step : (i + 1) * step]
        num_computed_tokens = microbatch["input_ids"].shape[1]
        assert num_computed_tokens == sum(pack["input_ids"].shape[1] for pack in members)
        # Reading documents by offsets gives the input documents, in order.
        offsets = microbatch["cu_seqlens"]
        assert (offsets[0], offsets[-1]) == (0, num_computed_tokens)
        lengths = [torch.diff(pack["cu_seqlens"]) for pack in members]
        torch.testing.assert_close(torch.diff(offsets), torch.cat(lengths), rtol=0, atol=0)
        for key in TENSORS:
            whole = torch.cat([pack[key] for pack in members], dim=1)
            torch.testing.assert_close(microbatch[key], whole, rtol=0, atol=0)
        for key in ("num_documents", "num_tokens", "num_loss_tokens", "sum_squared_lengths"):
            assert type(microbatch[key]) is int
            assert microbatch[key] == sum(pack[key] for pack in members)
        assert type(microbatch["max_seqlen"]) is int
        assert microbatch["max_seqlen"] == MAX_SEQ_LEN
        assert offsets.dtype == torch.int32


@pytest.mark.parametrize("size", range(1, 10))
def test_positions_restart_exactly_where_offsets_say(size: int):
    for microbatch in split_batch(random_packs(9, seed=3), size):
        starts = np.flatnonzero(microbatch["position_ids"][0].numpy() == 0)
        assert starts.tolist() == microbatch["cu_seqlens"][:-1].tolist()
        assert (microbatch["labels"][0, starts] == IGNORE_INDEX).all()


def test_a_single_pack_is_a_batch_of_one():
    pack = random_packs(3, seed=1)[2]
    (microbatch,) = split_batch(pack, 1)
    assert microbatch is pack
    assert num_documents(pack) == num_documents([pack]) == len(split_documents(pack))
    assert num_tokens(pack) == num_tokens([pack])


def test_counts_of_a_batch():
    packs = random_packs(6, seed=2)
    documents = [ids for pack in packs for ids in split_documents(pack)]
    assert num_documents(packs) == len(documents) > 0
    labels = torch.cat([pack["labels"][0] for pack in packs])
    assert num_tokens(packs) == {
        "total": sum(map(len, documents)),
        "loss_generating": int((labels != IGNORE_INDEX).sum()),
    }


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (None, r"device_train_microbatch_size: auto .* Set it .*to 1, and size pack_tokens"),
        (0.5, "microbatch size 0.5 must be an integer"),
        (1.5, "microbatch size 1.5 must be an integer"),
        (True, "microbatch size True must be an integer"),
        (0, "microbatch size 0 must be at least one pack; use 1"),
        (-1, "microbatch size -1 must be at least one pack; use 1"),
    ],
)
def test_a_size_that_is_not_a_number_of_packs_is_refused(size, message: str):
    with pytest.raises(ValueError, match=message):
        split_batch(random_packs(3), size)
