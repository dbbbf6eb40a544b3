"""The chunked cross-entropy against F.cross_entropy on all logits."""

import pytest
import torch
import torch.nn.functional as F

from foundry_ext.models import loss as loss_module
from foundry_ext.models.loss import (
    check_loss,
    evaluate_linear_head,
    labelled_positions,
    linear_cross_entropy,
)

ROWS, WIDTH, VOCABULARY = 50, 24, 131
CHUNK_ROWS = [0.5, 1, 7, 25, 50, 1000]  # less than one row, one, uneven, even, all, more than all


def make_head(rows=ROWS, width=WIDTH, vocabulary=VOCABULARY, dtype=torch.float32, seed=0):
    """hidden [L, D], weight [V, D], target [L] with ids 0 and V-1 among them."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()
    weight = (0.5 * torch.randn(vocabulary, width, generator=generator)).to(dtype).requires_grad_()
    target = torch.randint(0, vocabulary, (rows,), generator=generator)
    target[: min(rows, 2)] = torch.tensor([0, vocabulary - 1])[:rows]
    return hidden, weight, target


def their_loss(hidden, weight, target):
    return F.cross_entropy((hidden @ weight.t()).float(), target, reduction="sum")


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


def relative_error(ours, exact):
    return ((ours.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.fixture(params=CHUNK_ROWS)
def chunk_rows(request, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", int(request.param * VOCABULARY))
    return request.param


@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_value_and_gradients(chunk_rows, scale):
    hidden, weight, target = make_head()
    ours = linear_cross_entropy(hidden, weight, target)
    theirs = their_loss(hidden, weight, target)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    for our, their in zip(
        gradients(ours * scale, hidden, weight),
        gradients(theirs * scale, hidden, weight),
        strict=True,
    ):
        assert relative_error(our, their) <= 1e-6


def test_large_logits_stay_finite(chunk_rows):
    hidden, weight, target = make_head()
    with torch.no_grad():
        hidden *= 300
    ours, theirs = (f(hidden, weight, target) for f in (linear_cross_entropy, their_loss))
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    for our, their in zip(*(gradients(x, hidden, weight) for x in (ours, theirs)), strict=True):
        assert our.isfinite().all()
        assert relative_error(our, their) <= 1e-6


@pytest.mark.parametrize("weights_in_bf16", [False, True], ids=["autocast", "bf16"])
def test_loss_is_summed_in_fp32(weights_in_bf16, monkeypatch):
    """Trap 20: a sum in bf16 stops growing at 256 times its terms. Only the products are bf16."""
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 4 * VOCABULARY)
    dtype = torch.bfloat16 if weights_in_bf16 else torch.float32
    hidden, weight, target = make_head(rows=2000, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=not weights_in_bf16):
        ours = linear_cross_entropy(hidden, weight, target)
    with torch.no_grad():
        logits = (hidden.bfloat16() @ weight.bfloat16().t()).double()
        exact = F.cross_entropy(logits, target, reduction="sum")
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(exact.item(), rel=1e-6)


@pytest.mark.parametrize("weights_in_bf16", [False, True], ids=["autocast", "bf16"])
def test_gradients_in_bf16(weights_in_bf16, monkeypatch):
    """With 500 chunks as with one, gradients are as close to fp32 as bf16 products allow."""
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 4 * VOCABULARY)
    dtype = torch.bfloat16 if weights_in_bf16 else torch.float32
    hidden, weight, target = make_head(rows=2000, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=not weights_in_bf16):
        ours = gradients(linear_cross_entropy(hidden, weight, target), hidden, weight)
        theirs = gradients(their_loss(hidden, weight, target), hidden, weight)
    exact_inputs = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    exact = gradients(their_loss(*exact_inputs, target), *exact_inputs)
    for our, their, value in zip(ours, theirs, exact, strict=True):
        assert our.dtype == dtype
        assert relative_error(our, value) <= 1.2 * relative_error(their, value)


def test_autocast_uses_its_dtype():
    """fp32 products under autocast would be right, and several times slower."""
    hidden, weight, target = make_head()
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(hidden, weight, target)
        evaluated = evaluate_linear_head(hidden, weight, target)
    exact = their_loss(hidden, weight, target)
    assert ours.item() != pytest.approx(exact.item(), rel=1e-6)
    assert evaluated.loss.item() == pytest.approx(ours.item(), rel=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
def test_no_rows(autocast):
    """Trap 6, and for data-parallel ranks: 0, finite, with gradients of both inputs."""
    hidden, weight, target = make_head(rows=0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = linear_cross_entropy(hidden, weight, target)
        evaluated = evaluate_linear_head(hidden, weight, target)
    assert ours.item() == 0.0
    grad_hidden, grad_weight = gradients(ours, hidden, weight)
    assert grad_hidden.shape == hidden.shape
    assert torch.equal(grad_weight, torch.zeros_like(weight))
    assert evaluated.loss.item() == 0.0
    assert evaluated.num_correct.item() == 0


@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_frozen_input(frozen, chunk_rows):
    hidden, weight, target = make_head()
    {"weight": weight, "hidden": hidden}[frozen].requires_grad_(False)
    learned = hidden if frozen == "weight" else weight
    ours = linear_cross_entropy(hidden, weight, target)
    ours.backward()
    (exact,) = gradients(their_loss(hidden, weight, target), learned)
    assert relative_error(learned.grad, exact) <= 1e-6
    assert (weight if frozen == "weight" else hidden).grad is None


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_weight_costs_no_gradient(frozen, largest_tensor, monkeypatch):
    """With LoRA the head is frozen, and its gradient, as large as the head, is not computed."""
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 2 * 1000)
    hidden, weight, target = make_head(rows=8, width=64, vocabulary=1000)
    weight.requires_grad_(not frozen)
    with largest_tensor:
        linear_cross_entropy(hidden, weight, target).backward()
    assert (largest_tensor.numel >= weight.numel()) == (not frozen)


@pytest.mark.parametrize("evaluate", [False, True])
def test_logits_of_all_positions_never_exist(evaluate, largest_tensor, monkeypatch):
    """Trap 19, forward and backward: 16k tokens of SmolLM2 would be 3.2 GB."""
    rows, vocabulary, chunk = 2048, 512, 64
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", chunk * vocabulary)
    hidden, weight, target = make_head(rows=rows, width=16, vocabulary=vocabulary)
    with largest_tensor:
        if evaluate:
            evaluate_linear_head(hidden, weight, target)
        else:
            linear_cross_entropy(hidden, weight, target).backward()
    assert largest_tensor.numel == chunk * vocabulary < rows * vocabulary / 8


def test_chunks_default_to_64_mib():
    assert loss_module.CHUNK_ELEMENTS * 4 == 64 * 2**20
    assert loss_module.CHUNK_ELEMENTS // 49152 > 256, "rows enough for a matrix product"


def test_evaluation(chunk_rows):
    hidden, weight, target = make_head()
    logits = (hidden @ weight.t()).detach()
    target[::3] = logits.argmax(-1)[::3]
    ours = evaluate_linear_head(hidden, weight, target)
    assert ours.loss.item() == pytest.approx(
        F.cross_entropy(logits, target).item() * ROWS, rel=1e-6
    )
    assert ours.num_correct.dtype == torch.int64
    assert ours.num_correct.item() == (logits.argmax(-1) == target).sum().item() >= ROWS // 3
    assert not ours.loss.requires_grad


@pytest.mark.parametrize("weights_in_bf16", [False, True], ids=["autocast", "bf16"])
def test_evaluation_in_bf16(weights_in_bf16, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 4 * VOCABULARY)
    dtype = torch.bfloat16 if weights_in_bf16 else torch.float32
    hidden, weight, target = make_head(rows=2000, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=not weights_in_bf16):
        ours = evaluate_linear_head(hidden, weight, target)
    logits = (hidden.bfloat16() @ weight.bfloat16().t()).detach()
    exact = F.cross_entropy(logits.double(), target, reduction="sum")
    assert ours.loss.dtype == torch.float32
    assert ours.loss.item() == pytest.approx(exact.item(), rel=1e-6)
    assert ours.num_correct.item() == (logits.argmax(-1) == target).sum().item()


def test_of_equal_logits_the_first_is_the_prediction():
    """In bf16 several logits are often equal, and argmax takes the first."""
    hidden = torch.ones(4, 1)
    weight = torch.tensor([[0.0], [2.0], [1.0], [2.0], [2.0]])
    found = evaluate_linear_head(hidden, weight, torch.tensor([1, 3, 4, 2]))
    assert found.num_correct.item() == 1
    assert found.num_correct.dtype == torch.int64


def test_labelled_positions_example():
    positions, targets = labelled_positions(torch.tensor([-100, 6, 7, -100, 9]))
    assert positions.tolist() == [0, 1, 3]
    assert targets.tolist() == [6, 7, 9]


@pytest.mark.parametrize("seed", range(5))
def test_labelled_positions_shift_once(seed):
    """Trap 4, and trap 8: the id 0 is a label."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (200,), generator=generator)
    labels[torch.rand(200, generator=generator) < seed / 4] = -100
    labels[0] = -100
    expected = [(t, labels[t + 1].item()) for t in range(199) if labels[t + 1] != -100]
    count = len(expected)
    for known in (None, count):
        positions, targets = labelled_positions(labels, known)
        assert list(zip(positions.tolist(), targets.tolist(), strict=True)) == expected


@pytest.mark.parametrize("labels", [[-100], [-100] * 4])
@pytest.mark.parametrize("known", [None, 0])
def test_labelled_positions_of_nothing(labels, known):
    positions, targets = labelled_positions(torch.tensor(labels), known)
    assert positions.numel() == targets.numel() == 0


def test_check_loss(monkeypatch):
    assert check_loss("chunked") == "chunked"
    choice = "'fused' is unknown; choose one of auto, chunked, compiled, liger"
    with pytest.raises(ValueError, match=choice):
        check_loss("fused")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs a GPU; use 'chunked'"):
        check_loss("liger")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("implementation", ["chunked", "liger"])
@pytest.mark.parametrize("rows", [0, 1, 300])
def test_on_a_gpu(implementation, rows, monkeypatch):
    if implementation == "liger":
        pytest.importorskip("liger_kernel")
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 64 * 1000)
    inputs = make_head(rows=rows, width=64, vocabulary=1000)
    hidden, weight = (x.detach().cuda().requires_grad_() for x in inputs[:2])
    target = inputs[2].cuda()
    exact = their_loss(*inputs)
    exact_gradients = gradients(exact, *inputs[:2])
    with torch.autocast("cuda", torch.bfloat16):
        ours = linear_cross_entropy(hidden, weight, target, implementation=implementation)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(exact.item(), rel=5e-3)
    for our, value in zip(gradients(ours, hidden, weight), exact_gradients, strict=True):
        assert our.shape == value.shape
        assert rows == 0 or relative_error(our.cpu(), value) <= 2e-2
