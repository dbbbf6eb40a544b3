"""Properties of labels and masks: the right states predict labels, and padding round-trips."""

import pytest
import torch

pytest.importorskip("hypothesis", reason="run `make install`")

from hypothesis import given
from hypothesis import strategies as st

from foundry_ext.models.loss import labelled_positions
from foundry_ext.models.padding import Padded
from foundry_ext.utils.constants import IGNORE_INDEX
from tests.properties import examples


@examples(200)
@given(st.lists(st.one_of(st.just(IGNORE_INDEX), st.integers(0, 5)), min_size=1, max_size=30))
def test_every_label_is_predicted_from_the_token_before_it(labels):
    labels = torch.tensor([IGNORE_INDEX, *labels])
    expected = [(at - 1, int(label)) for at, label in enumerate(labels) if label != IGNORE_INDEX]
    for count in (None, len(expected)):
        positions, targets = labelled_positions(labels, count)
        assert list(zip(positions.tolist(), targets.tolist(), strict=True)) == expected


@st.composite
def masks(draw):
    """Draw masks whose ones are contiguous in each row, anywhere; rows may be all padding."""
    seq_len = draw(st.integers(1, 8))
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        start = draw(st.integers(0, seq_len))
        end = draw(st.integers(start, seq_len))
        rows.append([int(start <= at < end) for at in range(seq_len)])
    return torch.tensor(rows)


@examples(200)
@given(masks())
def test_padding_comes_off_and_on_again(mask):
    batch, seq_len = mask.shape
    padded = Padded.from_mask(mask, batch=batch, seq_len=seq_len, device=mask.device)
    tokens = torch.arange(1, batch * seq_len + 1).reshape(batch, seq_len)
    flat = padded.unpad(tokens)
    assert flat.tolist() == tokens[mask.bool()].tolist()
    assert padded.repad(flat).tolist() == (tokens * mask).tolist()
    lengths = mask.sum(1).tolist()
    assert padded.cu_seqlens.diff().tolist() == lengths
    assert padded.position_ids.tolist() == [at for length in lengths for at in range(length)]
    # Labels: those the model would see for each row alone.
    first = {
        row.nonzero()[0].item() + number * seq_len for number, row in enumerate(mask) if row.any()
    }
    expected = [
        IGNORE_INDEX if place in first else int(tokens.flatten()[place])
        for place in mask.flatten().nonzero().flatten().tolist()
    ]
    assert padded.unpad_labels(tokens).tolist() == expected
