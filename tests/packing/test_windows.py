"""Windows of shards: every document once, the same on any ranks, found again at any batch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from foundry_ext.packing.window_sampler import WindowSampler
from foundry_ext.packing.windows import WindowSettings, make_windows, pack_window
from foundry_ext.utils.errors import UserError

CAPACITY = 32


class Sized(Dataset):
    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size


class Lengths:
    """Shards of documents, each named by shard * 1000 + row."""

    varies = False

    def __init__(self, shards: list[list[int]]):
        self.shards = [np.array(lengths, dtype=np.int32) for lengths in shards]
        self.prepared: list[tuple[list[int], list[int]]] = []

    def sizes(self) -> np.ndarray:
        return np.array([len(lengths) for lengths in self.shards])

    def documents(self, epoch: int, units: np.ndarray):
        names = [unit * 1000 + np.arange(len(self.shards[unit])) for unit in units]
        empty = np.empty(0, np.int64)
        return (
            np.concatenate([empty, *names]),
            np.concatenate([empty, *(self.shards[unit] for unit in units)]).astype(np.int64),
        )

    def prepare(self, units: np.ndarray, following: np.ndarray) -> None:
        self.prepared.append((units.tolist(), following.tolist()))

    @property
    def used(self) -> list[int]:
        return [
            shard * 1000 + row
            for shard, lengths in enumerate(self.shards)
            for row, length in enumerate(lengths)
            if length
        ]


def make(shards: Lengths, *, window=10, batch_packs=1, rank=0, world_size=1, **options):
    return WindowSampler(
        Sized(len(shards.used)),
        shards,
        window=window,
        capacity=CAPACITY,
        batch_packs=batch_packs,
        rank=rank,
        world_size=world_size,
        **{"shuffle": True, "seed": 17, **options},
    )


def walk(sampler: WindowSampler, epoch: int = 0, first: int = 0) -> list[list[list[int]]]:
    """Return batches of packs, in Composer's way."""
    sampler.resume_at(epoch=epoch, batch=first)
    sampler.set_epoch(epoch)
    return [[pack.tolist() for pack in batch] for batch in sampler]


def random_shards(num: int, seed: int = 0) -> Lengths:
    rng = np.random.default_rng(seed)
    return Lengths(
        [rng.integers(0, CAPACITY + 1, rng.integers(1, 20)).tolist() for _ in range(num)]
    )


shard_lengths = st.lists(
    st.lists(st.integers(0, CAPACITY), min_size=0, max_size=12), min_size=1, max_size=12
).filter(lambda shards: any(map(any, shards)))


@settings(max_examples=60, deadline=None)
@given(
    shards=shard_lengths,
    window=st.integers(1, 40),
    batch_packs=st.integers(1, 3),
    world_size=st.integers(1, 4),
    epoch=st.integers(0, 3),
    shuffle=st.booleans(),
)
def test_each_document_once_an_epoch(shards, window, batch_packs, world_size, epoch, shuffle):
    shards = Lengths(shards)
    ranks = [
        walk(
            make(
                shards,
                window=window,
                batch_packs=batch_packs,
                rank=rank,
                world_size=world_size,
                shuffle=shuffle,
            ),
            epoch,
        )
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    packs = [pack for batches in ranks for batch in batches for pack in batch]
    assert sorted(document for pack in packs for document in pack) == shards.used
    for pack in packs:
        assert sum(shards.shards[name // 1000][name % 1000] for name in pack) <= CAPACITY


def global_batches(shards: Lengths, world_size: int, epoch: int, first: int = 0):
    """Return the packs of each global batch, which are 4, in the order of the plan."""
    ranks = [
        walk(
            make(shards, batch_packs=4 // world_size, rank=rank, world_size=world_size),
            epoch,
            first,
        )
        for rank in range(world_size)
    ]
    batches = zip(*ranks, strict=True)
    return [[pack for packs in zip(*batch, strict=True) for pack in packs] for batch in batches]


@pytest.mark.parametrize("world_size", [2, 4])
def test_any_number_of_ranks_sees_the_same_batches(world_size: int):
    shards = random_shards(30)
    assert global_batches(shards, world_size, epoch=1) == global_batches(shards, 1, epoch=1)


def test_a_run_goes_on_anywhere_on_another_number_of_ranks():
    shards = random_shards(30)
    batches = global_batches(shards, 1, epoch=2)
    for first in range(len(batches)):
        assert global_batches(shards, 2, epoch=2, first=first) == batches[first:]


def test_going_on_packs_no_window_before_it():
    """The packs of each window are known, so one or two windows are packed for a batch."""
    shards = random_shards(60)
    whole = make(shards)
    counts = whole.plan(0).counts
    expected = walk(whole)[len(whole) // 2]
    packed = []
    sampler = make(shards, count=lambda epoch, number, count: counts)
    documents = shards.documents
    shards.documents = lambda epoch, units: packed.append(units.tolist()) or documents(epoch, units)
    batch = sampler.batch(len(sampler) // 2)
    assert [pack.tolist() for pack in batch] == expected
    assert 1 <= len(packed) <= 2 < 10 < len(counts)


def test_epochs_differ_in_windows_and_packs():
    shards = random_shards(30)
    sampler = make(shards, window=40, batch_packs=500)  # one batch in any epoch
    windows = [{frozenset(units.tolist()) for units in sampler.plan(e).windows} for e in (0, 1)]
    assert len(windows[0] & windows[1]) < len(windows[0]) / 2
    assert walk(sampler, 0) == walk(sampler, 0) != walk(sampler, 1)


def test_without_shuffling_documents_keep_their_order():
    shards = random_shards(10)
    batches = walk(make(shards, shuffle=False))
    assert [name for batch in batches for pack in batch for name in pack] == shards.used


def test_an_epoch_of_another_length_takes_the_first_epochs_packs():
    """Composer holds every epoch to the first one's number of batches."""
    for seed in range(20):
        shards = random_shards(12, seed)
        sampler = make(shards)
        other = next((e for e in range(1, 20) if sampler.plan(e).source != e), None)
        if other is not None:
            break
    assert other is not None
    first, again = walk(sampler, 0), walk(sampler, other)
    assert len(first) == len(again) and first != again
    assert sorted(sorted(pack) for [pack] in first) == sorted(sorted(pack) for [pack] in again)


def test_the_next_window_is_asked_for_while_one_trains():
    shards = random_shards(30)
    sampler = make(shards)
    walk(sampler)
    windows = [units.tolist() for units in sampler.plan(0).windows]
    seen = [pair for i, pair in enumerate(shards.prepared) if pair not in shards.prepared[:i]]
    assert seen == list(zip(windows, [*windows[1:], []], strict=True))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(1, 30))
def test_windows_hold_consecutive_shards_and_enough_documents(sizes, window):
    plan = WindowSettings(CAPACITY, window, seed=0, shuffle=False)
    windows = make_windows(sizes, plan, epoch=0)
    assert np.concatenate(windows).tolist() == list(range(len(sizes)))
    documents = [sum(sizes[unit] for unit in units) for units in windows]
    assert all(number >= window for number in documents[:-1])
    assert len(windows) == 1 or 2 * documents[-1] >= window


def test_windows_of_one_size_are_packed_differently():
    lengths = np.random.default_rng(0).integers(1, CAPACITY, 200)
    plan = WindowSettings(CAPACITY, 1, seed=0, shuffle=True)
    first, second = (pack_window(lengths, plan, epoch=0, number=number) for number in (0, 1))
    assert first.documents.tolist() != second.documents.tolist()


def test_no_document_is_an_error():
    with pytest.raises(UserError, match="no documents left"):
        make(Lengths([[0, 0], []]))


def test_too_few_packs_for_a_batch_is_an_error():
    with pytest.raises(UserError, match="1 packs do not fill one global batch of 8 x 1"):
        make(Lengths([[3, 4]]), batch_packs=8, drop_last=True)
