"""Columns of tokens: ids in two bytes, masks as places; and the fingerprints of int32 and bytes."""

import datasets
import numpy as np
import pyarrow as pa
import pytest

from foundry_ext.data.documents import FEATURES, Documents
from foundry_ext.data.row_outcome import RowOutcome
from foundry_ext.data.table import Record, Tokens, to_table
from foundry_ext.packing.collator import PackCollator

IDS = [[5, 6, 7], [8, 9], [], [49151, 0, 1, 2, 65535], [3] * 6, [4, 4], [7, 7, 7, 7]]
MASKS = [
    [0, 1, 1],
    [1, 1],
    [],
    [0, 0, 1, 0, 1],
    [0, 1, 1, 0, 0, 1],
    [0, 0],
    [1, 1, 0, 0],
]
ALL = np.arange(len(IDS))


def documents_of(table: pa.Table, *chunks: int) -> Documents:
    """Return the documents of a table in chunks of so many rows."""
    ends = np.cumsum(chunks)
    parts = [table.slice(end - size, size) for end, size in zip(ends, chunks, strict=True)]
    table = pa.concat_tables(parts) if parts else table
    return Documents(datasets.Dataset(table, info=datasets.DatasetInfo()))


def new_table(masks=MASKS, **settings) -> pa.Table:
    tokens = [
        Tokens(np.array(ids, np.int32), np.array(mask, np.bool_))
        for ids, mask in zip(IDS, masks, strict=True)
    ]
    return to_table([Record(one, RowOutcome.KEPT) for one in tokens], **settings)


def old_table(masks=MASKS) -> pa.Table:
    zeros = [0] * len(IDS)
    columns = {"input_ids": IDS, "has_loss": masks, "outcome": zeros, "num_cut": zeros}
    return datasets.Dataset.from_dict(columns, features=FEATURES).data.table


def contents(documents: Documents) -> list:
    return [(one.input_ids.tolist(), one.loss_mask.tolist()) for one in documents.read(ALL)]


WANTED = [(ids, [bool(one) for one in mask]) for ids, mask in zip(IDS, MASKS, strict=True)]


@pytest.mark.parametrize("chunks", [(), (2, 1, 4), (1, 6)])
@pytest.mark.parametrize("max_id", [65535, 65536])
def test_documents_are_read_as_they_were_written(max_id: int, chunks):
    table = new_table(max_id=max_id, with_responses=True)
    small = max_id == 65535
    assert table.column("input_ids").type == pa.list_(pa.uint16() if small else pa.int32())
    documents = documents_of(table, *chunks)
    assert contents(documents) == WANTED
    assert all(one.loss_mask.dtype == np.bool_ for one in documents.read(ALL))


@pytest.mark.parametrize("chunks", [(), (2, 1, 4)])
def test_an_earlier_version_s_table_is_read(chunks):
    assert contents(documents_of(old_table(), *chunks)) == WANTED


def test_plain_text_has_no_masks():
    table = new_table([[1] * len(ids) for ids in IDS])
    assert table.column_names == ["input_ids", "outcome", "num_cut"]
    assert contents(documents_of(table, 3, 4)) == [(ids, [True] * len(ids)) for ids in IDS]


@pytest.mark.parametrize("chunks", [(), (2, 1, 4)])
def test_fingerprints_are_those_of_yesterday(chunks):
    """Checkpoints hold them. These were computed when tables had int32 ids and a byte of mask."""
    ones = [[1] * len(ids) for ids in IDS]
    for table in (
        old_table(),
        new_table(with_responses=True),
        new_table(with_responses=True, max_id=65535),
    ):
        assert documents_of(table, *chunks).fingerprint == "dd55ae82f5a2b733"
    for table in (old_table(ones), new_table(), new_table(ones, with_responses=True, max_id=65535)):
        assert documents_of(table, *chunks).fingerprint == "875ef1477724eb40"


def test_an_id_that_does_not_fit_is_no_other_id():
    with pytest.raises(pa.ArrowInvalid, match="65536 not in range"):
        tokens = Tokens(np.array([5, 65536], np.int32), np.ones(2, np.bool_))
        to_table([Record(tokens, RowOutcome.KEPT)], max_id=49151)


def test_packs_are_those_of_int32_ids():
    collate = PackCollator(max_seq_len=8, pack_tokens=64)
    small = documents_of(new_table(with_responses=True, max_id=65535), 2, 1, 4)
    wide = documents_of(old_table())
    ours, theirs = (collate(one.read(ALL[[0, 3, 4, 6]])) for one in (small, wide))
    for key in ("input_ids", "labels"):
        assert ours[key].dtype == theirs[key].dtype
        assert ours[key].tolist() == theirs[key].tolist()


def test_a_token_takes_two_bytes_and_its_mask_hardly_any():
    ids = np.arange(1000, dtype=np.int32)
    rows = [Record(Tokens(ids, ids >= 400), RowOutcome.KEPT)] * 50
    table = to_table(rows, max_id=49151, with_responses=True)
    assert table.nbytes / (50 * 1000) < 2.05
