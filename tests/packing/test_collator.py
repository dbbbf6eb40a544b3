"""A pack: labels, offsets, counts and types, and optionally a fixed shape."""

import numpy as np
import pytest
import torch

from foundry_ext.packing.algorithm import most_documents
from foundry_ext.packing.batch import Pack
from foundry_ext.packing.collator import PackCollator
from foundry_ext.utils.constants import IGNORE_INDEX
from tests.data.kit import MAX_SEQ_LEN, document, random_documents, split_documents

PACK_TOKENS = 100
DTYPES = {
    "input_ids": torch.int64,
    "position_ids": torch.int64,
    "labels": torch.int64,
    "cu_seqlens": torch.int32,
}


def collate(documents, **settings) -> Pack:
    return PackCollator(max_seq_len=MAX_SEQ_LEN, pack_tokens=PACK_TOKENS, **settings)(documents)


def counts(pack: Pack) -> tuple[int, int, int]:
    return pack["num_documents"], pack["num_tokens"], pack["num_loss_tokens"]


def test_worked_example():
    pack = PackCollator(max_seq_len=8, pack_tokens=8)([document([5, 6, 7]), document([8, 9])])
    assert pack["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert pack["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert pack["labels"].tolist() == [[IGNORE_INDEX, 6, 7, IGNORE_INDEX, 9]]
    assert pack["cu_seqlens"].tolist() == [0, 3, 5]
    assert counts(pack) == (2, 5, 3)
    assert pack["sum_squared_lengths"] == 9 + 4


@pytest.mark.parametrize("fixed_shape", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_types(seed: int, fixed_shape: bool):
    pack = collate(random_documents(seed, seed), fixed_shape=fixed_shape)
    assert {key: pack[key].dtype for key in DTYPES} == DTYPES
    num_computed_tokens = pack["input_ids"].shape[1]
    for key in ("input_ids", "position_ids", "labels"):
        assert pack[key].shape == (1, num_computed_tokens)
    assert pack["cu_seqlens"].ndim == 1
    # Python ints: a tensor would synchronise, and a changing value recompile.
    keys = ("max_seqlen", "num_documents", "num_tokens", "num_loss_tokens", "sum_squared_lengths")
    for key in keys:
        assert type(pack[key]) is int
    lengths = [len(document.input_ids) for document in random_documents(seed, seed)]
    assert pack["sum_squared_lengths"] == sum(length**2 for length in lengths)  # without padding
    assert pack["max_seqlen"] == MAX_SEQ_LEN


@pytest.mark.parametrize("seed", range(5))
def test_documents_come_back_out(seed: int):
    documents = random_documents(6, seed)
    pack = collate(documents)
    assert split_documents(pack) == [document.input_ids.tolist() for document in documents]
    labels = split_documents(pack, "labels")
    for one, got in zip(documents, labels, strict=True):
        want = np.where(one.loss_mask, one.input_ids, IGNORE_INDEX)
        want[0] = IGNORE_INDEX  # nothing of the same document comes before it
        assert got == want.tolist()
    assert split_documents(pack, "position_ids") == [
        list(range(len(document.input_ids))) for document in documents
    ]
    num_loss_tokens = int((pack["labels"] != IGNORE_INDEX).sum())
    assert counts(pack) == (6, sum(map(len, split_documents(pack))), num_loss_tokens)


def test_the_first_token_has_no_label_even_where_all_is_predicted():
    pack = collate([document([3, 4, 5], prompt=0), document([6, 7], prompt=0)])
    assert pack["labels"].tolist() == [[IGNORE_INDEX, 4, 5, IGNORE_INDEX, 7]]
    assert pack["num_loss_tokens"] == 3


def test_real_tokens_equal_to_the_pad_token_keep_their_labels():
    """Trap 8: 0 is a real id and often the pad token too, as is the end of text."""
    pack = collate([document([1, 0, 0, 2, 0])], pad_token_id=0)
    assert pack["labels"].tolist() == [[IGNORE_INDEX, 0, 0, 2, 0]]
    assert counts(pack) == (1, 5, 4)


@pytest.mark.parametrize("pad_token_id", [0, 7])
def test_an_empty_pack_is_one_pad_token_without_weight(pad_token_id: int):
    pack = collate([], pad_token_id=pad_token_id)
    assert pack["input_ids"].tolist() == [[pad_token_id]]
    assert pack["position_ids"].tolist() == [[0]]
    assert pack["labels"].tolist() == [[IGNORE_INDEX]]
    assert pack["cu_seqlens"].tolist() == [0, 1]
    assert counts(pack) == (0, 0, 0)


def test_fixed_shape_is_one_shape_for_every_pack():
    packs = [collate(random_documents(n, n), fixed_shape=True) for n in range(6)]
    full = [document([1] * MAX_SEQ_LEN)] * (PACK_TOKENS // MAX_SEQ_LEN)
    ones = [document([1])] * PACK_TOKENS  # the most documents a pack can hold
    packs += [collate(full, fixed_shape=True), collate(ones, fixed_shape=True)]
    shapes = {tuple((key, *pack[key].shape) for key in DTYPES) for pack in packs}
    assert len(shapes) == 1


def test_a_fixed_shape_has_room_for_the_most_documents_and_no_more():
    """A kernel starts work for every entry of cu_seqlens: one per token costs too much."""
    documents = [document([1] * length) for length in (2, 2, 3, 5, MAX_SEQ_LEN)]
    lengths = np.array([len(one.input_ids) for one in documents])
    most = most_documents(lengths, PACK_TOKENS)
    fillers = -(-PACK_TOKENS // MAX_SEQ_LEN)
    for chosen in ([], documents[:1], documents[:4], documents):
        pack = collate(chosen, fixed_shape=True, max_documents=most)
        loose = collate(chosen, fixed_shape=True)
        assert len(pack["cu_seqlens"]) == most + fillers + 1 < len(loose["cu_seqlens"])
        offsets = loose["cu_seqlens"].tolist()
        assert pack["cu_seqlens"].tolist() == offsets[: len(pack["cu_seqlens"])]
        assert pack["cu_seqlens"][-1] == PACK_TOKENS
        for key in ("input_ids", "position_ids", "labels"):
            assert pack[key].equal(loose[key])


@pytest.mark.parametrize("num", range(6))
def test_fixed_shape_only_fills_up(num: int):
    documents = random_documents(num, seed=num)
    pack, plain = collate(documents, fixed_shape=True, pad_token_id=7), collate(documents)
    assert counts(pack) == counts(plain)
    used = pack["num_tokens"]
    assert split_documents(pack) == split_documents(plain) if num else not used
    for key in ("input_ids", "position_ids", "labels"):
        if num:
            assert pack[key][:, :used].tolist() == plain[key].tolist()
    assert (pack["input_ids"][0, used:] == 7).all()
    assert (pack["labels"][0, used:] == IGNORE_INDEX).all()
    # Padding is cut into documents of at most max_seqlen; the last ends repeat.
    offsets = pack["cu_seqlens"].numpy()
    lengths = np.diff(offsets)
    assert offsets[-1] == PACK_TOKENS == pack["input_ids"].shape[1]
    assert len(offsets) == PACK_TOKENS + 1
    assert (lengths >= 0).all()
    assert lengths.max() <= MAX_SEQ_LEN == pack["max_seqlen"]
    positions = np.concatenate([np.arange(length) for length in lengths])
    assert pack["position_ids"][0].tolist() == positions.tolist()
