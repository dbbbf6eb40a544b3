"""Documents of prepared data: those of the rows, each as often as its source is used."""

import pickle
from collections import Counter

import numpy as np
import pytest
from torch.utils.data import Dataset

from foundry_ext.data.prepared.documents import PreparedDocuments
from foundry_ext.data.row_outcome import RowOutcome
from foundry_ext.data.table import to_records
from foundry_ext.packing.window_sampler import WindowSampler
from foundry_ext.utils.errors import UserError
from tests.data.prepared.kit import (
    join_sources,
    make_row,
    open_documents,
    open_source,
    write_prepared,
)

LIMIT = 12


@pytest.fixture
def shards(tmp_path):
    rng = np.random.default_rng(0)
    shards = [
        [make_row(int(length), row, with_loss=True) for row, length in enumerate(lengths)]
        for lengths in (rng.integers(0, 30, size) for size in (7, 12, 3, 9, 8))
    ]
    write_prepared(tmp_path / "data", shards)
    return shards


def all_documents(documents: PreparedDocuments, epoch: int = 0):
    units = np.arange(len(documents.sizes()))
    names, lengths = documents.documents(epoch, units)
    return names[lengths > 0], lengths[lengths > 0]


@pytest.mark.parametrize("overlong", ["truncate", "drop"])
def test_tokens_are_those_of_the_cut_rows(tmp_path, shards, overlong):
    documents = open_documents(tmp_path / "data", LIMIT, overlong=overlong)
    expected = [
        record.tokens
        for rows in shards
        for row in rows
        for record in to_records(0, row, LIMIT, overlong)
        if len(record.tokens.input_ids)
    ]
    names, lengths = all_documents(documents)
    assert lengths.tolist() == [len(tokens.input_ids) for tokens in expected]
    order = np.random.default_rng(1).permutation(len(names))
    read = documents.read(names[order])
    for position, document in zip(order, read, strict=True):
        assert document.input_ids.tolist() == expected[position].input_ids.tolist()
        assert document.loss_mask.tolist() == expected[position].loss_mask.tolist()


def test_document_names_its_row(tmp_path, shards):
    documents = open_documents(tmp_path / "data", LIMIT)
    names, _ = all_documents(documents)
    rows = [row for rows in shards for row in rows]
    kept = [
        number
        for number, row in enumerate(rows)
        if next(iter(to_records(0, row, LIMIT, "truncate"))).outcome
        in (RowOutcome.KEPT, RowOutcome.TRUNCATED)
    ]
    assert [documents.locate(int(name)) for name in names] == [(0, row) for row in kept]


def test_every_document_is_trained_on_once_an_epoch(tmp_path, shards):
    documents = open_documents(tmp_path / "data", LIMIT)
    names, _ = all_documents(documents)

    class Sized(Dataset):
        def __len__(self) -> int:
            return len(names)

    sampler = WindowSampler(
        Sized(),
        documents,
        window=10,
        capacity=16,
        batch_packs=2,
        rank=0,
        world_size=1,
        shuffle=True,
        seed=0,
    )
    used = [int(name) for batch in sampler for pack in batch for name in pack]
    assert sorted(used) == sorted(names.tolist())
    assert used != names.tolist()


def test_two_passes_and_a_half_use_every_document_as_often(tmp_path, shards):
    documents = open_documents(tmp_path / "data", LIMIT, passes=2.5)
    counts: Counter[int] = Counter()
    for epoch in range(4):
        names, lengths = all_documents(documents, epoch)
        counts.update(names.tolist())
        tokens = sum(all_documents(open_documents(tmp_path / "data", LIMIT))[1])
        # The part of each of the five shards ends with a whole document.
        assert abs(lengths.sum() - 2.5 * tokens) <= 5 * LIMIT
    assert set(counts.values()) == {10}


def test_parts_of_an_epoch_differ_between_epochs(tmp_path, shards):
    documents = open_documents(tmp_path / "data", LIMIT, passes=0.3)
    first, second = (set(all_documents(documents, epoch)[0].tolist()) for epoch in (0, 1))
    assert first and second and not first & second


def test_several_sources(tmp_path, shards):
    write_prepared(tmp_path / "more", [[make_row(5, row, with_loss=True) for row in range(4)]])
    sources = [open_source(tmp_path / "data", LIMIT), open_source(tmp_path / "more", LIMIT)]
    documents = join_sources(sources)
    names, lengths = all_documents(documents)
    assert documents.locate(int(names[-1])) == (1, 3)
    (ids, _), read_lengths = documents.read_flat(names[::-1])
    assert read_lengths.tolist() == lengths[::-1].tolist()
    assert ids[:5].tolist() == make_row(5, 3, with_loss=True).input_ids.tolist()
    assert documents.fingerprint != join_sources(sources[:1]).fingerprint


def test_fingerprint_changes_with_what_decides_the_documents(tmp_path, shards):
    options = [
        {},
        {"overlong": "drop"},
        {"passes": 2.0},
        {"max_seq_len": LIMIT + 1},
    ]
    documents = [
        open_documents(tmp_path / "data", **{"max_seq_len": LIMIT, **some}) for some in options
    ]
    assert len({one.fingerprint for one in documents}) == len(options)


def test_goes_to_a_worker_process_with_files_open(tmp_path, shards):
    documents = open_documents(tmp_path / "data", LIMIT)
    names, _ = all_documents(documents)
    ids = documents.read_flat(names)[0].input_ids
    copy = pickle.loads(pickle.dumps(documents))
    assert copy.read_flat(names)[0].input_ids.tolist() == ids.tolist()


def test_too_long_a_row_is_an_error_under_overlong_error(tmp_path, shards):
    source = open_source(tmp_path / "data", LIMIT, "error")
    with pytest.raises(UserError, match=r"data: piece 0: a row has \d+ tokens, more than max_seq_"):
        source.check_overlong("data")
    open_source(tmp_path / "data", 100, "error").check_overlong("data")


def test_rows_with_prompts_are_not_split(tmp_path, shards):
    with pytest.raises(UserError, match="split is for prepared plain text"):
        open_source(tmp_path / "data", LIMIT, "split").check_overlong("data")
