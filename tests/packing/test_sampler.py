"""Batches of a rank and epoch: every document once, equal numbers on all ranks, resumable."""

import logging
from itertools import pairwise

import numpy as np
import pytest
from torch.utils.data import Dataset, DistributedSampler

from foundry_ext.packing.algorithm import pack
from foundry_ext.packing.packs import reordered
from foundry_ext.packing.sampler import PackedBatchSampler

CAPACITY = 64


class Sized(Dataset):
    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size


def random_lengths(num: int = 300, seed: int = 0, unused: float = 0.1) -> np.ndarray:
    """Draw lengths; 0 stands for a dropped row."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(num) < unused, 0, rng.integers(2, CAPACITY // 2, num))


def make(lengths, batch_packs=2, rank=0, world_size=1, **settings) -> PackedBatchSampler:
    settings = {"capacity": CAPACITY, "shuffle": True, "seed": 17, **settings}
    dataset = Sized(int(np.count_nonzero(lengths)))
    return PackedBatchSampler(
        dataset, lengths, batch_packs=batch_packs, rank=rank, world_size=world_size, **settings
    )


def walk(sampler: PackedBatchSampler, epoch: int = 0) -> list[list[list[int]]]:
    """Return batches of packs of document indices, in Composer's way."""
    sampler.set_epoch(epoch)
    return [[pack.tolist() for pack in batch] for batch in sampler]


def walk_ranks(lengths, world_size: int, epoch: int = 0, **settings):
    return [
        walk(make(lengths, rank=rank, world_size=world_size, **settings), epoch)
        for rank in range(world_size)
    ]


def flat(batches) -> list[int]:
    return [index for batch in batches for pack in batch for index in pack]


def compositions(batches) -> list[list[int]]:
    """Return the packs sorted, to compare without their order."""
    return sorted(sorted(pack) for batch in batches for pack in batch)


def test_worked_example():
    """Packs A B C on two ranks of one pack: [A] [C] and [B] [empty]."""
    lengths = [8, 8, 8]
    first, second = walk_ranks(lengths, 2, batch_packs=1, capacity=8, shuffle=False)
    a, b, c = make(lengths, capacity=8, shuffle=False).plan(0)
    assert first == [[a.tolist()], [c.tolist()]]
    assert second == [[b.tolist()], [[]]]


@pytest.mark.parametrize("batch_packs", [1, 2, 5])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("epoch", [0, 3])
def test_each_document_once_an_epoch(world_size: int, batch_packs: int, epoch: int):
    lengths = random_lengths()
    ranks = walk_ranks(lengths, world_size, epoch, batch_packs=batch_packs)
    used = sorted(index for batches in ranks for index in flat(batches))
    assert used == np.flatnonzero(lengths).tolist()
    for batches in ranks:
        for batch in batches:
            assert all(lengths[pack].sum() <= CAPACITY for pack in batch if pack)


@pytest.mark.parametrize("num", [1, 2, 7, 61, 300])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_rank_has_as_many_packs_in_every_batch(world_size: int, num: int):
    """Trap 18: unequal numbers would make ranks wait for each other forever."""
    lengths = random_lengths(num, unused=0)
    for rank, batches in enumerate(walk_ranks(lengths, world_size, batch_packs=3)):
        sampler = make(lengths, rank=rank, world_size=world_size, batch_packs=3)
        assert len(batches) == len(sampler) == -(-len(sampler.plan(0)) // (3 * world_size))
        assert {len(batch) for batch in batches} == {3}


def test_only_the_last_global_batch_is_completed():
    lengths = random_lengths()
    num_packs, size = len(make(lengths).plan(0)), 7 * 2
    ranks = walk_ranks(lengths, 2, batch_packs=7)
    assert num_packs % size, "choose other lengths: nothing is to be completed"
    empty = [[not pack for pack in batch] for batches in ranks for batch in batches[:-1]]
    assert not any(map(any, empty))
    last = [not pack for batches in ranks for pack in batches[-1]]
    assert sum(last) == -num_packs % size


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_the_plan_knows_nothing_of_ranks(epoch: int):
    lengths = random_lengths()
    (alone,) = walk_ranks(lengths, 1, epoch, batch_packs=6)
    for world_size in (2, 3, 6):
        ranks = walk_ranks(lengths, world_size, epoch, batch_packs=6 // world_size)
        together = [
            [pack for packs in zip(*batches, strict=True) for pack in packs]
            for batches in zip(*ranks, strict=True)
        ]
        assert together == alone


@pytest.mark.parametrize("world_size", [1, 2])
def test_drop_last_leaves_out_what_fills_no_global_batch(world_size: int):
    lengths = random_lengths()
    complete = walk_ranks(lengths, world_size, batch_packs=7)
    dropped = walk_ranks(lengths, world_size, batch_packs=7, drop_last=True)
    for with_last, without in zip(complete, dropped, strict=True):
        assert without == with_last[:-1]
    assert len(make(lengths, batch_packs=7, world_size=world_size, drop_last=True)) == len(without)


@pytest.mark.parametrize("world_size", [1, 3])
def test_resuming_gives_the_rest(world_size: int):
    """Trap 13: nothing is carried from batch to batch, so any batch can be the first."""
    lengths = random_lengths()
    for rank in range(world_size):
        whole = walk(make(lengths, rank=rank, world_size=world_size), epoch=2)
        for batch in range(len(whole) + 1):
            sampler = make(lengths, rank=rank, world_size=world_size)
            sampler.resume_at(epoch=2, batch=batch)
            assert sampler.first_batch == batch
            assert len(sampler) == len(whole)
            assert walk(sampler, epoch=2) == whole[batch:]
            assert sampler.first_batch == 0
            assert walk(sampler, epoch=3) == walk(
                make(lengths, rank=rank, world_size=world_size), epoch=3
            )


def test_resuming_at_an_epochs_end_skips_nothing_of_the_next():
    """If max_duration stops Composer after the last batch, it resumes in the next epoch."""
    lengths = random_lengths()
    sampler = make(lengths)
    sampler.resume_at(epoch=1, batch=len(sampler))
    assert walk(sampler, epoch=2) == walk(make(lengths), epoch=2)


def test_any_batch_is_found_without_the_others():
    sampler = make(random_lengths())
    whole = walk(sampler)
    assert [pack.tolist() for pack in sampler.batch(4)] == whole[4]


def test_epochs_differ_and_repeat():
    """Trap 43: the epoch comes from `set_epoch`, which Composer calls on a DistributedSampler."""
    lengths = random_lengths()
    sampler = make(lengths)
    assert isinstance(sampler, DistributedSampler)
    epochs = [walk(sampler, epoch) for epoch in range(3)]
    for one, other in pairwise(epochs):
        assert one != other
        assert compositions(one) != compositions(other)
    assert walk(sampler, 1) == epochs[1]
    assert walk(make(lengths), 2) == epochs[2]
    assert walk(make(lengths, seed=18), 1) != epochs[1]


def test_without_shuffling_all_epochs_are_one():
    sampler = make(random_lengths(), shuffle=False)
    assert walk(sampler, 0) == walk(sampler, 1) == walk(sampler, 12345)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_without_shuffling_documents_keep_their_order(world_size: int, drop_last: bool):
    """From document to document over all ranks and batches, whatever the seed."""
    lengths = random_lengths()
    settings = {"shuffle": False, "drop_last": drop_last, "seed": 5 + world_size}
    ranks = walk_ranks(lengths, world_size, epoch=3, **settings)
    in_turn = [
        pack for step in zip(*ranks, strict=True) for b in zip(*step, strict=True) for pack in b
    ]
    order = [index for pack in in_turn for index in pack]
    used = np.flatnonzero(lengths).tolist()
    assert order == used[: len(order)]
    assert drop_last or order == used
    filled = [lengths[pack].sum() for pack in in_turn if pack]
    following = [lengths[pack[0]] for pack in in_turn[1:] if pack]
    assert all(a + b > CAPACITY for a, b in zip(filled[:-1], following, strict=True))


def test_what_the_order_costs_is_logged(caplog):
    with caplog.at_level(logging.INFO, "foundry_ext"):
        make([40, 40, 20, 20], shuffle=False)
    assert "3 packs, 62.50 % full" in caplog.text and "about 2" in caplog.text


@pytest.mark.parametrize(("seed", "others"), [(17, "more"), (18, "fewer")])
def test_as_many_batches_every_epoch(seed: int, others: str):
    """Composer reads the number once: a batch more would be lost, one less end the epoch early."""
    lengths = np.random.default_rng(5).integers(CAPACITY // 4, CAPACITY // 2, 200)
    needed = [len(pack(lengths, CAPACITY, seed=seed, epoch=epoch)) for epoch in range(30)]
    other = max(needed) if others == "more" else min(needed)
    assert other != needed[0], f"choose other lengths: no epoch needs {others} of {needed}"
    sampler = make(lengths, batch_packs=1, seed=seed)
    orders = set()
    for epoch in range(30):
        batches = walk(sampler, epoch)
        assert len(batches) == len(sampler) == needed[0]
        assert sorted(flat(batches)) == list(range(len(lengths)))
        assert walk(make(lengths, batch_packs=1, seed=seed), epoch) == batches
        orders.add(str(batches))
    assert len(orders) == 30


def test_the_digest_tells_plans_apart():
    lengths = random_lengths()
    digests = [make(lengths).plan_digest(epoch) for epoch in range(3)]
    assert len(set(digests)) == 3
    assert make(lengths, batch_packs=3, world_size=2, rank=1).plan_digest(0) == digests[0]
    assert make(lengths, seed=18).plan_digest(0) not in digests


def test_nothing_is_taken_for_padding():
    """Trap 32: Composer would cut `total_size - len(dataset)` samples off the last batch."""
    for world_size in (1, 2, 3):
        lengths = random_lengths(31)
        sampler = make(lengths, world_size=world_size)
        assert sampler.total_size == len(sampler.dataset) == np.count_nonzero(lengths)


def test_no_documents_are_an_error():
    with pytest.raises(ValueError, match="no documents left"):
        make(np.zeros(5, dtype=np.int64))


def test_too_few_packs_to_drop_the_last_are_an_error():
    with pytest.raises(ValueError, match=r"3 packs .* batch of 2 x 2; .* drop_last: false"):
        make([CAPACITY] * 3, batch_packs=2, world_size=2, drop_last=True)
    assert len(make([CAPACITY] * 3, batch_packs=2, world_size=2)) == 1


def test_the_packs_are_the_same_in_another_order():
    packs = pack(random_lengths(200, unused=0), CAPACITY, seed=1, epoch=0)
    ordered = reordered(packs, np.random.default_rng(3))
    places = np.random.default_rng(3).permutation(len(packs))
    assert [ordered[i].tolist() for i in range(len(packs))] == [packs[i].tolist() for i in places]
    assert (ordered.capacity, ordered.num_tokens) == (packs.capacity, packs.num_tokens)
