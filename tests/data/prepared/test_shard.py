"""Shards: what was written is read, whole or in pieces; a changed byte is noticed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streaming import StreamingDataset

from foundry_ext.data.prepared.shard import RowSizes, Shard, write_shard
from foundry_ext.data.table import NO_TOKENS, Tokens
from foundry_ext.data.token_columns import ids_type
from foundry_ext.utils.errors import UserError


def make_rows(lengths, vocabulary=49152, seed=0, with_loss=True) -> list[Tokens]:
    rng = np.random.default_rng(seed)
    return [
        Tokens(
            rng.integers(0, vocabulary, length, dtype=np.int32),
            rng.random(length) < 0.5 if with_loss else np.ones(length, np.bool_),
        )
        for length in lengths
    ]


def write(folder, rows, *, vocabulary=49152, with_loss=True) -> Shard:
    ids = str(ids_type(vocabulary - 1))
    about = write_shard(folder, rows, ids=ids, with_loss=with_loss)
    return Shard(folder / "shard.00000.mds", about, ids)


@pytest.mark.parametrize("vocabulary", [49152, 151936])
@pytest.mark.parametrize("with_loss", [True, False])
def test_pieces_of_rows_in_any_order(tmp_path_factory, vocabulary: int, with_loss: bool):
    @settings(max_examples=30, deadline=None)
    @given(st.data())
    def check(data):
        lengths = data.draw(st.lists(st.integers(0, 70), min_size=1, max_size=9))
        rows = make_rows(lengths, vocabulary, data.draw(st.integers(0, 9)), with_loss)
        shard = write(
            tmp_path_factory.mktemp("shard") / "s", rows, vocabulary=vocabulary, with_loss=with_loss
        )
        assert len(shard) == len(rows)
        asked = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=12))
        pieces = [
            sorted(data.draw(st.tuples(*[st.integers(0, lengths[row])] * 2))) for row in asked
        ]
        starts = np.array([start for start, _ in pieces], dtype=np.int64)
        ends = np.array([end for _, end in pieces], dtype=np.int64)
        ids, mask = shard.read(np.array(asked, dtype=np.int64), starts, ends - starts)
        expected = [rows[row] for row in asked]
        wanted = [
            part[start:end]
            for tokens, (start, end) in zip(expected, pieces, strict=True)
            for part in [tokens.input_ids]
        ]
        assert ids.tolist() == [one for part in wanted for one in part.tolist()]
        masks = [
            tokens.loss_mask[start:end]
            for tokens, (start, end) in zip(expected, pieces, strict=True)
        ]
        assert mask.tolist() == [one for part in masks for one in part.tolist()]
        assert mask.dtype == np.bool_

    check()


def test_ids_take_two_bytes_if_the_vocabulary_allows(tmp_path):
    rows = make_rows([1000] * 50, with_loss=False)
    size = write(tmp_path / "s", rows, with_loss=False).path.stat().st_size
    assert 2 * 50_000 < size < 2.03 * 50_000


def test_largest_id_of_two_bytes_survives(tmp_path):
    row = Tokens(np.array([0, 2**16 - 1], np.int32), np.ones(2, np.bool_))
    shard = write(tmp_path / "s", [row], vocabulary=2**16)
    assert shard.read(np.array([0]), np.array([0]), np.array([2])).input_ids.tolist() == [0, 65535]


def test_equal_rows_make_equal_bytes(tmp_path):
    rows = make_rows([5, 0, 17])
    first, second = (write(tmp_path / name, rows).path.read_bytes() for name in "ab")
    assert first == second


def test_streaming_reads_it(tmp_path):
    rows = make_rows([3, 5])
    write(tmp_path / "s", rows)
    stored = StreamingDataset(local=str(tmp_path / "s"), batch_size=1, shuffle=False)
    assert np.frombuffer(stored[1]["ids"], "<u2").tolist() == rows[1].input_ids.tolist()
    bits = np.unpackbits(np.frombuffer(stored[1]["loss"], np.uint8), bitorder="little")
    assert bits[:5].tolist() == rows[1].loss_mask.tolist()


def test_changed_byte_is_an_error(tmp_path):
    rows = make_rows([3, 5])
    ids = "uint16"
    about = write_shard(tmp_path / "s", rows, ids=ids, with_loss=True)
    path = tmp_path / "s" / "shard.00000.mds"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"shard.00000.mds: its bytes are not those .* prepare it"):
        Shard(path, about, ids)
    path.write_bytes(data[:-1])
    with pytest.raises(UserError, match="not those that were written"):
        Shard(path, about, ids)


def test_sizes_name_the_first_token_to_learn():
    masks = [[1, 0, 0, 1], [1, 0], [], [1], [0, 1, 1]]
    rows = [Tokens(np.zeros(len(mask), np.int32), np.array(mask, np.bool_)) for mask in masks]
    sizes = RowSizes.of([*rows, NO_TOKENS])
    assert sizes.lengths.tolist() == [4, 2, 0, 1, 3, 0]
    never = 2**32 - 1
    assert sizes.first_loss.tolist() == [3, never, never, never, 1, never]
