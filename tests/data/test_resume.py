"""Resumption of a loader: exactly the remaining batches, of the same documents."""

import io

import numpy as np
import pytest
import torch
from composer import ComposerModel, Trainer
from composer.utils import reproducibility
from torch import nn

from foundry_ext.data.dataloader import PackedDataLoader, PackedDataset
from foundry_ext.data.documents import Documents
from foundry_ext.data.sources import load_rows
from foundry_ext.data.tokenize import TokenizeSettings, tokenize_rows
from foundry_ext.packing.collator import PackCollator
from foundry_ext.utils.errors import UserError
from tests.data.kit import assert_batches_equal, build, walk

CAPACITY = 256


@pytest.fixture
def dataset(make_rows, write_jsonl, tmp_path, monkeypatch) -> dict:
    monkeypatch.chdir(tmp_path)
    path = str(write_jsonl(make_rows(90)))
    section = {"hf_name": path, "split": "train", "max_seq_len": 128, "shuffle": True}
    return {**section, "pack_tokens": CAPACITY}


@pytest.fixture
def documents(dataset, tokenizer) -> Documents:
    rows = load_rows(dataset["hf_name"], "train")
    return tokenize_rows(rows, tokenizer, TokenizeSettings(max_seq_len=128))


def loader_of(documents, batch_packs=2, rank=0, world_size=1, **settings) -> PackedDataLoader:
    settings = {"capacity": CAPACITY, "shuffle": True, "seed": 17, **settings}
    settings |= {"batch_packs": batch_packs, "rank": rank, "world_size": world_size}
    collator = PackCollator(max_seq_len=128, pack_tokens=settings["capacity"])
    return PackedDataLoader(PackedDataset(documents, collator, settings))


def walk_loader(loader: PackedDataLoader, epoch: int):
    loader.dataset.sampler.set_epoch(epoch)
    return list(loader)


def saved(state: dict) -> dict:
    """Return the state after writing and reading it as a file, like a checkpoint."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def stop_after(loader: PackedDataLoader, epoch: int, batch: int) -> dict:
    """Return the state saved after training on `batch` batches of this epoch."""
    loader.dataset.sampler.set_epoch(epoch)
    for number, _ in enumerate(loader, start=1):
        if number == batch:
            break
    return saved(loader.dataset.state_dict(num_samples=12345, from_beginning=True))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_gives_the_rest(tokenizer, dataset, num_workers: int):
    whole = walk(build(tokenizer, dataset), epoch=1)
    next_epoch = walk(build(tokenizer, dataset), epoch=2)
    batches = range(1, len(whole) + 1) if num_workers == 0 else (3, len(whole))
    for batch in batches:
        first = build(tokenizer, dataset, num_workers=num_workers)
        state = stop_after(first.dataloader, 1, batch)
        assert (state["epoch"], state["batch"]) == (1, batch)
        second = build(tokenizer, dataset, num_workers=num_workers)
        second.dataloader.dataset.load_state_dict(state)
        again = second.dataloader.dataset.state_dict()
        assert {**again, "rng": None} == {**state, "rng": None}
        assert_batches_equal(walk(second, epoch=1), whole[batch:])
        assert_batches_equal(walk(second, epoch=2), next_epoch)


def test_no_earlier_document_is_read(documents, monkeypatch):
    read = []

    def read_documents(self, indices, plain=Documents.read):
        read.extend(indices)
        return plain(self, indices)

    loader = loader_of(documents)
    packs = loader.dataset.sampler.plan(1)
    state = stop_after(loader, 1, 5)
    monkeypatch.setattr(Documents, "read", read_documents)
    resumed = loader_of(documents)
    resumed.dataset.load_state_dict(state)
    assert read == []
    walk_loader(resumed, 1)
    used = resumed.dataset.sampler.used
    assert read == [used[index] for i in range(5 * 2, len(packs)) for index in packs[i]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_after_an_epoch_comes_the_next(tokenizer, dataset, num_workers: int):
    first = build(tokenizer, dataset, num_workers=num_workers)
    walk(first, epoch=1)
    state = saved(first.dataloader.dataset.state_dict())
    assert (state["epoch"], state["batch"]) == (2, 0)
    second = build(tokenizer, dataset)
    second.dataloader.dataset.load_state_dict(state)
    assert_batches_equal(walk(second, epoch=2), walk(build(tokenizer, dataset), epoch=2))


def test_a_state_counts_what_was_yielded_not_what_was_read_ahead(tokenizer, dataset):
    spec = build(tokenizer, dataset, num_workers=2, prefetch_factor=4)
    for number, _ in enumerate(spec.dataloader, start=1):
        assert spec.dataloader.dataset.state_dict()["batch"] == number


def test_stopped_after_an_epochs_last_batch(documents):
    """Resumption works whether Composer's clock is still in that epoch or in the next one."""
    loader = loader_of(documents)
    state = stop_after(loader, 1, len(loader))
    assert (state["epoch"], state["batch"]) == (1, len(loader))
    next_epoch = walk_loader(loader_of(documents), 2)
    still, already = loader_of(documents), loader_of(documents)
    still.dataset.load_state_dict(state)
    assert walk_loader(still, 1) == []
    assert_batches_equal(walk_loader(still, 2), next_epoch)
    already.dataset.load_state_dict(state)
    assert_batches_equal(walk_loader(already, 2), next_epoch)


@pytest.mark.parametrize(
    ("before", "after"), [((4, 1), (2, 2)), ((2, 2), (4, 1)), ((1, 3), (3, 1))]
)
def test_another_number_of_ranks_goes_on_with_the_same_batches(documents, before, after):
    batch_packs, world_size = before
    whole = [
        walk_loader(loader_of(documents, batch_packs, rank, world_size), 1)
        for rank in range(world_size)
    ]
    state = stop_after(loader_of(documents, batch_packs, 0, world_size), 1, 4)
    batch_packs, world_size = after
    rest = []
    for rank in range(world_size):
        loader = loader_of(documents, batch_packs, rank, world_size)
        loader.dataset.load_state_dict(state)
        assert loader.dataset.next_batch == 4
        rest.append(walk_loader(loader, 1))

    def in_turn(ranks) -> list:
        return [
            [pack for packs in zip(*b, strict=True) for pack in packs]
            for b in zip(*ranks, strict=True)
        ]

    assert_batches_equal(in_turn(rest), in_turn(whole)[4:])


def test_another_batch_size_goes_on_where_it_meets_the_end_of_a_batch(documents):
    plan = loader_of(documents).dataset.sampler.plan(1)
    state = stop_after(loader_of(documents, batch_packs=3), 1, 4)
    loader = loader_of(documents, batch_packs=2)
    loader.dataset.load_state_dict(state)
    assert loader.dataset.next_batch == 6
    rest = walk_loader(loader, 1)
    num_documents = sum(pack["num_documents"] for batch in rest for pack in batch)
    assert num_documents == sum(len(plan[i]) for i in range(12, len(plan)))


@pytest.mark.parametrize(("batch_packs", "world_size"), [(2, 1), (1, 2), (4, 2)])
def test_inside_a_global_batch_is_an_error(documents, batch_packs: int, world_size: int):
    state = stop_after(loader_of(documents, batch_packs=3), 1, 3)
    loader = loader_of(documents, batch_packs, 0, world_size)
    message = rf"after 9 packs, inside a global batch of {batch_packs} x {world_size}; restore"
    with pytest.raises(ValueError, match=message):
        loader.dataset.load_state_dict(state)


class Lengths(Documents):
    """Stand-in for documents with lengths only."""

    def __init__(self, lengths):
        self.lengths = np.asarray(lengths)
        self.fingerprint = "lengths"


def test_a_batch_size_under_which_the_epoch_has_other_packs_is_an_error():
    """Epoch 3 needs one pack more than epoch 0: one batch more of one pack, but none of two."""
    documents = Lengths(np.random.default_rng(5).integers(16, 32, 200))
    one, two = (loader_of(documents, size, capacity=64) for size in (1, 2))
    plans = [loader.dataset.sampler.plan_digest(3) for loader in (one, two)]
    assert plans[0] != plans[1], "choose other lengths: the plans are the same"
    state = {**one.dataset.state_dict(), "epoch": 3, "batch": 4, "plan": plans[0]}
    one.dataset.load_state_dict(state)
    with pytest.raises(ValueError, match="inside epoch 3, which has other packs under this global"):
        two.dataset.load_state_dict(state)
    # At an epoch's beginning nothing has been used yet, so any plan will do.
    two.dataset.load_state_dict({**state, "batch": 0, "plan": None})


CHANGES = {
    "seed": {"shuffle_seed": 18},
    "order": {"shuffle": False},
    "capacity": {"pack_tokens": 300},
    "labels": {"target_prompts": "all"},
    "length": {"max_seq_len": 24, "overlong": "truncate"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_data_or_packing_is_an_error(tokenizer, dataset, change: str):
    """Trap 31."""
    state = stop_after(build(tokenizer, dataset).dataloader, 0, 2)
    other = build(tokenizer, {**dataset, **CHANGES[change]}).dataloader
    with pytest.raises(ValueError, match=r"made with other data or packing .* load_weights_only"):
        other.dataset.load_state_dict(state)


@pytest.mark.parametrize("batch", [0, 3])
def test_the_order_of_an_earlier_version_is_an_error(documents, batch: int):
    """It shuffled the documents once under shuffle: false; its states have no `order`."""
    loader = loader_of(documents, shuffle=False)
    state = stop_after(loader, 1, batch or len(loader))
    state |= {"batch": batch, "plan": "0123456789abcdef" if batch else None}
    del state["order"]
    with pytest.raises(UserError, match=r"shuffle: false; foundry_ext \d.* keeps their order"):
        loader_of(documents, shuffle=False).dataset.load_state_dict(state)


def test_a_shuffled_run_of_an_earlier_version_goes_on(documents):
    state = stop_after(loader_of(documents), 1, 3)
    del state["order"]
    assert state["fingerprint"] == f"{documents.fingerprint}-{CAPACITY}-17-1"
    resumed = loader_of(documents)
    resumed.dataset.load_state_dict(state)
    assert_batches_equal(walk_loader(resumed, 1), walk_loader(loader_of(documents), 1)[3:])


def test_in_order_resuming_gives_the_rest(documents):
    """On another number of ranks too, and in a second epoch as in the first."""
    whole = walk_loader(loader_of(documents, batch_packs=4, shuffle=False), 0)
    state = stop_after(loader_of(documents, batch_packs=4, shuffle=False), 1, 3)
    rest = []
    for rank in range(2):
        loader = loader_of(documents, 2, rank, 2, shuffle=False)
        loader.dataset.load_state_dict(state)
        rest.append(walk_loader(loader, 1))
    for one, other, both in zip(*rest, whole[3:], strict=True):
        assert_batches_equal([[one[0], other[0], one[1], other[1]]], [both])


def test_in_order_the_seed_decides_nothing(documents):
    state = stop_after(loader_of(documents, shuffle=False), 0, 3)
    state["fingerprint"] = state["fingerprint"].replace("-17-0", "-18-0")
    resumed = loader_of(documents, shuffle=False)
    resumed.dataset.load_state_dict(state)
    assert_batches_equal(
        walk_loader(resumed, 0), walk_loader(loader_of(documents, shuffle=False), 0)[3:]
    )


def test_other_rows_are_an_error(tokenizer, dataset, make_rows, write_jsonl):
    state = stop_after(build(tokenizer, dataset).dataloader, 0, 2)
    rows = make_rows(90)
    rows[7]["response"] = rows[7]["response"][:-1] + "?"  # as long, but not the same
    dataset["hf_name"] = str(write_jsonl(rows, "other.jsonl"))
    way_out = r"made with other data or packing .*; restore .*other\.jsonl and the YAML; give"
    with pytest.raises(ValueError, match=way_out):
        build(tokenizer, dataset).dataloader.dataset.load_state_dict(state)


def test_what_decides_no_token_may_change(tokenizer, dataset):
    state = stop_after(build(tokenizer, dataset).dataloader, 0, 2)
    dataset |= {"max_seq_len": 200, "overlong": "drop", "fixed_shape": True}
    build(tokenizer, dataset, num_workers=2).dataloader.dataset.load_state_dict(state)


def test_a_checkpoint_of_another_loader_is_an_error(documents):
    """Without the error, Composer would start at the epoch's first batch."""
    with pytest.raises(ValueError, match=r"made with another loader .* load_weights_only: true"):
        loader_of(documents).dataset.load_state_dict(None)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_random_numbers_go_on_too(tokenizer, dataset, num_workers: int):
    """Trap 31: Composer does not restore them if a dataset resumes by itself."""

    def train(loader, draws: list, stop: int | None = None):
        loader.dataset.sampler.set_epoch(0)
        for number, _ in enumerate(loader, start=1):
            draws.append((torch.rand(3).tolist(), np.random.rand()))
            if number == stop:
                return saved(loader.dataset.state_dict())

    whole, parts = [], []
    reproducibility.seed_all(5)
    train(build(tokenizer, dataset).dataloader, whole)
    reproducibility.seed_all(5)
    state = train(build(tokenizer, dataset).dataloader, parts, stop=4)
    reproducibility.seed_all(99)
    resumed = build(tokenizer, dataset, num_workers=num_workers).dataloader
    resumed.dataset.load_state_dict(state)
    torch.rand(10)  # something in between, such as a first evaluation
    train(resumed, parts)
    assert parts == whole


def test_at_an_epochs_start_random_numbers_are_composers(documents):
    loader = loader_of(documents)
    state = stop_after(loader, 1, len(loader))
    resumed = loader_of(documents)
    resumed.dataset.load_state_dict(state)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    walk_loader(resumed, 2)
    assert torch.equal(torch.get_rng_state(), before)


class Recorder(ComposerModel):
    """Model that records its inputs and the random numbers that it drew."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Embedding(320, 1)
        self.seen: list[tuple[bytes, float]] = []

    def forward(self, batch):
        self.seen.append((batch["input_ids"].numpy().tobytes(), torch.rand(()).item()))
        return self.layer(batch["input_ids"]).mean()

    def loss(self, outputs, batch, *args, **kwargs):
        return outputs


def train(tokenizer, dataset, folder, duration: str, load_path=None) -> list:
    model = Recorder()
    spec = build(tokenizer, dataset)
    trainer = Trainer(
        model=model,
        optimizers=torch.optim.SGD(model.parameters(), lr=1e-3),
        train_dataloader=spec,
        max_duration=duration,
        device_train_microbatch_size=1,
        accumulate_train_batch_on_tokens=True,
        save_folder=str(folder),
        save_filename="ba{batch}.pt",
        save_interval="1ba",
        save_overwrite=True,
        load_path=load_path,
        seed=3,
        device="cpu",
        progress_bar=False,
    )
    trainer.fit()
    # Its clock is in the next epoch now, where the last batch was the epoch's last one.
    trainer.save_checkpoint(str(folder / "end.pt"))
    trainer.close()
    return model.seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stop", ["inside an epoch", "at its last batch", "at its end"])
def test_composer_goes_on_where_it_stopped(tokenizer, dataset, tmp_path, stop: str):
    """Batches and random numbers are equal, through Composer's own checkpoints."""
    num_batches = len(build(tokenizer, dataset).dataloader)
    batch = 5 if stop == "inside an epoch" else num_batches
    name = "end.pt" if stop == "at its end" else f"ba{batch}.pt"
    whole = train(tokenizer, dataset, tmp_path / "whole", "3ep")
    assert len(whole) == 3 * num_batches * 2
    first = train(tokenizer, dataset, tmp_path / "a", f"{batch}ba")
    rest = train(tokenizer, dataset, tmp_path / "b", "3ep", str(tmp_path / "a" / name))
    assert len(first) == batch * 2
    assert first + rest == whole
