"""Cuts: the same documents as tokenising with the settings makes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foundry_ext.data.prepared.cuts import cut_rows
from foundry_ext.data.prepared.shard import RowSizes
from foundry_ext.data.table import Tokens, to_records

masks = st.lists(st.lists(st.booleans(), max_size=20), max_size=8)


def compare(rows: list[Tokens], limit: int, overlong: str) -> None:
    records = [
        (index, record)
        for index, row in enumerate(rows)
        for record in to_records(index, row, limit, overlong)
    ]
    cuts = cut_rows(RowSizes.of(rows), limit, overlong)
    assert cuts.rows.tolist() == [index for index, _ in records]
    assert cuts.outcomes.tolist() == [record.outcome for _, record in records]
    truncated = [record.num_truncated_tokens for _, record in records]
    assert cuts.num_truncated_tokens.tolist() == truncated
    pieces = [
        rows[row].input_ids[start : start + length].tolist()
        for row, start, length in zip(cuts.rows, cuts.starts, cuts.lengths, strict=True)
    ]
    assert pieces == [record.tokens.input_ids.tolist() for _, record in records]


@pytest.mark.parametrize("overlong", ["truncate", "drop"])
@settings(max_examples=200, deadline=None)
@given(masks=masks, limit=st.integers(2, 12))
def test_rows_with_prompts(overlong: str, masks, limit: int):
    rows = [
        Tokens(np.arange(len(mask), dtype=np.int32), np.array(mask, np.bool_)) for mask in masks
    ]
    compare(rows, limit, overlong)


@pytest.mark.parametrize("overlong", ["truncate", "drop", "split"])
@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), max_size=8), limit=st.integers(2, 12))
def test_plain_text(overlong: str, lengths, limit: int):
    rows = [Tokens(np.arange(n, dtype=np.int32), np.ones(n, np.bool_)) for n in lengths]
    compare(rows, limit, overlong)
