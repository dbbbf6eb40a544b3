"""Padded batches to flat tokens and back."""

import pytest
import torch

from foundry_ext.models.padding import Padded

CPU = torch.device("cpu")
MASKS = {
    "right": [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]],
    "left": [[0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]],
    "mixed": [[1, 1, 1, 0], [0, 0, 0, 1], [1, 1, 1, 1]],
    "both ends": [[0, 1, 1, 0], [1, 1, 0, 0]],
    "an empty row": [[1, 1, 0], [0, 0, 0], [0, 1, 1]],
}


def padded(mask):
    mask = torch.tensor(mask)
    return Padded.from_mask(mask, batch=mask.shape[0], seq_len=mask.shape[1], device=CPU)


def test_the_docstrings_example():
    example = padded([[1, 1, 0], [0, 1, 1]])
    assert example.slot_index.tolist() == [0, 1, 4, 5]
    assert example.cu_seqlens.tolist() == [0, 2, 4]
    assert example.position_ids.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("name", MASKS)
def test_every_row_is_a_document(name):
    mask = torch.tensor(MASKS[name])
    ours = padded(MASKS[name])
    lengths = mask.sum(1)
    assert ours.cu_seqlens.dtype == torch.int32
    assert ours.cu_seqlens.diff().tolist() == lengths.tolist()
    expected = [position for length in lengths.tolist() for position in range(length)]
    assert ours.position_ids.tolist() == expected


@pytest.mark.parametrize("name", MASKS)
def test_round_trip(name):
    mask = torch.tensor(MASKS[name])
    x = torch.randn(*mask.shape, 5)
    ours = padded(MASKS[name])
    flat = ours.unpad(x)
    assert torch.equal(flat, x[mask.bool()])
    assert torch.equal(ours.repad(flat), x * mask[..., None])


def test_round_trip_gradient():
    x = torch.randn(3, 4, 5, requires_grad=True)
    ours = padded(MASKS["mixed"])
    ours.repad(ours.unpad(x)).sum().backward()
    assert torch.equal(x.grad, torch.tensor(MASKS["mixed"])[..., None].expand(3, 4, 5).float())


def test_no_mask_is_no_padding():
    ours = Padded.from_mask(None, batch=2, seq_len=3, device=CPU)
    assert ours.cu_seqlens.tolist() == [0, 3, 6]
    assert ours.slot_index.tolist() == list(range(6))
    assert ours.position_ids.tolist() == [0, 1, 2, 0, 1, 2]


def test_one_row_serves_the_whole_batch():
    """Position ids may come as [1, S]."""
    ours = padded(MASKS["left"])
    assert ours.unpad(torch.arange(4)[None]).tolist() == [1, 2, 3, 3, 0, 1, 2, 3]


@pytest.mark.parametrize("name", MASKS)
def test_labels_lose_each_rows_first(name):
    """The previous state belongs to another row; the id 0 is a label like any other."""
    mask = torch.tensor(MASKS[name])
    labels = torch.zeros(mask.shape, dtype=torch.long)
    ours = padded(MASKS[name])
    flat = ours.unpad_labels(labels)
    assert torch.equal(flat == -100, ours.position_ids == 0)
    assert (flat[ours.position_ids > 0] == 0).all()
    assert (labels == 0).all(), "the caller's labels were changed"


@pytest.mark.parametrize("row", [[1, 0, 1], [0, 1, 0, 1], [1, 1, 0, 1, 1], [1, 0, 1, 0]])
def test_a_hole_is_refused(row):
    with pytest.raises(ValueError, match="attention_mask has zeros between"):
        padded([[1] * len(row), row])


@pytest.mark.parametrize("shape", [(2, 1, 3, 3), (2, 4), (1, 3), (3,)])
def test_another_shape_is_refused(shape):
    """Some packers describe which tokens see each other by a 4-D mask; here cu_seqlens does."""
    with pytest.raises(ValueError, match="cu_seqlens"):
        Padded.from_mask(torch.ones(shape), batch=2, seq_len=3, device=CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_everything_is_on_the_device():
    for mask in (None, torch.ones(2, 3, device="cuda")):
        ours = Padded.from_mask(mask, batch=2, seq_len=3, device=torch.device("cuda"))
        for x in (ours.slot_index, ours.cu_seqlens, ours.position_ids):
            assert x.is_cuda
