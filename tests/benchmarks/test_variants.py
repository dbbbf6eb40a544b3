"""Every variant sees the same documents and computes the same loss and gradients."""

import dataclasses
import itertools

import pytest
import torch

from benchmarks.variants import METHODS, VARIANTS, Absent, Bench, inner, make_batches
from benchmarks.workloads import (
    LENGTHS,
    draw_lengths,
    make_documents,
    named_case,
    num_computed_tokens,
    packed_workload,
)

HERE = ("hf_padded", "hf_padded_no_mask", "unpadded", "unpadded_larger", "ours_eager", "ours")


def documents_of(batches):
    """Return (ids, labels after the first token) of every document, sorted, without padding."""
    found = []
    for batch in batches:
        ids, labels = batch["input_ids"], batch["labels"]
        ends = batch.get("cu_seqlens", batch.get("cu_seq_lens_q"))
        if ends is not None:
            spans = [(0, int(start), int(end)) for start, end in itertools.pairwise(ends)]
        else:
            mask = batch["attention_mask"]
            spans = [(row, 0, int(mask[row].sum())) for row in range(len(mask))]
        for row, start, end in spans:
            wanted = labels[row, start:end].tolist()[1:]
            if set(wanted) - {-100}:  # a filling document has no label
                found.append((ids[row, start:end].tolist(), wanted))
    return sorted(found)


def expected(workload):
    return sorted(
        (
            document.input_ids.tolist(),
            [
                int(token) if has else -100
                for token, has in zip(document.input_ids[1:], document.loss_mask[1:], strict=True)
            ],
        )
        for document in workload.documents
    )


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "hf_padded_no_mask"])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_batches_hold_the_workloads_documents(name, rows, workload, make_setup):
    batches = make_batches(name, workload, make_setup(compile="layers"), rows)
    assert documents_of(batches) == expected(workload)
    assert num_computed_tokens(batches) >= workload.num_tokens
    labels = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    assert labels == workload.num_loss_tokens


def test_compiled_packs_have_one_shape(workload, make_setup):
    fixed = make_batches("ours", workload, make_setup(compile="layers"))
    assert {batch["input_ids"].shape for batch in fixed} == {(1, 64)}
    assert len({batch["cu_seqlens"].shape for batch in fixed}) == 1
    free = make_batches("ours", workload, make_setup(compile="none"))
    assert num_computed_tokens(free) == workload.num_tokens


@pytest.mark.parametrize("method", METHODS)
def test_losses_and_gradients_are_equal(method, workload, make_setup):
    bench = Bench(make_setup(method=method))
    trained = {n: p for n, p in bench.source.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(1)
    if method != "full":  # B is zero at first, and would hide the adapter
        for parameter in trained.values():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(0.05 * noise)
    gradients, losses = {}, {}
    for name in HERE:
        step = bench.step(name, workload)
        kept = {}

        def keep(kept=kept):
            kept.update({n: p.grad.clone() for n, p in trained.items()})

        bench.optimizer.step = keep
        losses[name] = step().item()
        gradients[name] = kept
    for name in HERE[1:]:
        assert losses[name] == pytest.approx(losses["hf_padded"], rel=1e-5), name
        for key, gradient in gradients["hf_padded"].items():
            torch.testing.assert_close(
                gradients[name][key], gradient, rtol=2e-4, atol=2e-6, msg=f"{name} {key}"
            )


def test_the_microbatch_does_not_change_the_loss(workload, make_setup):
    bench = Bench(make_setup())
    losses = [bench.step("hf_padded", workload, rows)().item() for rows in (1, 2, 3, 5)]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)


def test_a_timed_step_leaves_the_weights_and_a_learning_one_does_not(workload, make_setup):
    for learning_rate, same in ((0.0, True), (1e-2, False)):
        step = Bench(make_setup(learning_rate=learning_rate)).step("ours", workload)
        first, second = step().item(), step().item()
        assert (first == second) is same


def test_frozen_bf16_is_held_by_both_sides(workload, make_setup):
    keys = {"method": "lora", "precision": "amp_bf16"}
    plain = Bench(make_setup(**keys))
    held = Bench(make_setup(**keys, frozen_dtype="bf16"))
    for name in ("hf_padded", "ours"):
        step = held.step(name, workload)
        types = {p.dtype for p in step.model.parameters() if p.ndim == 2}
        assert types == {torch.bfloat16, torch.float32}
        assert step().item() == pytest.approx(plain.step(name, workload)().item(), rel=1e-3)


def test_flash_is_absent_with_a_reason(workload, make_setup):
    with pytest.raises(Absent, match="needs a GPU"):
        Bench(make_setup()).step("hf_padding_free", workload)


def test_variants_share_their_weights(workload, make_setup):
    bench = Bench(make_setup(method="dora"))
    steps = [bench.step(name, workload) for name in ("hf_padded", "ours")]
    first, second = ({id(p) for p in step.model.parameters()} for step in steps)
    assert first == second
    assert first == {id(p) for p in bench.source.parameters()}


@pytest.mark.parametrize("name", LENGTHS)
def test_packed_workloads_are_as_full_as_a_data_set(name):
    made = packed_workload(
        name, vocabulary=100, labelled=1.0, pack_tokens=4096, num_packs=2, microbatches=(4, 999)
    )
    assert made.num_tokens / (2 * 4096) > 0.995
    assert made.microbatches == tuple(sorted({min(4, len(made.documents)), len(made.documents)}))
    batches = make_batches("ours_eager", made, None)  # pyright: ignore[reportArgumentType]
    assert len(batches) == 2


def test_named_cases_have_their_fill():
    case = named_case("longest", vocabulary=100, labelled=0.5, count=8)
    longest = max(len(document.input_ids) for document in case.documents)
    assert case.num_tokens / (8 * longest) == pytest.approx(0.66, abs=0.01)
    assert case.num_loss_tokens == pytest.approx(case.num_tokens / 2, abs=8)
    padded = named_case("to2048", vocabulary=100, labelled=1.0, count=4)
    assert padded.num_tokens / (4 * 2048) == pytest.approx(0.39, abs=0.01)
    assert padded.pad_to == 2048
    assert draw_lengths("a", 8, fill=0.66, pad_to=None) == [
        len(document.input_ids) for document in case.documents
    ]


def test_a_first_token_has_no_label():
    (document,) = make_documents([5], vocabulary=10, labelled=1.0)
    assert document.loss_mask.tolist() == [False, True, True, True, True]


def test_the_counts_are_those_of_the_documents(workload):
    assert workload.num_tokens == 113
    assert workload.sum_squared_lengths == 40**2 + 7**2 + 23**2 + 31**2 + 12**2
    assert workload.num_loss_tokens == 20 + 4 + 12 + 16 + 6
    short = dataclasses.replace(workload, documents=workload.documents[:1])
    assert short.num_loss_tokens == 20


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "dora"])
def test_compiled_variants_compute_the_same_loss(method, workload, make_setup):
    bench = Bench(make_setup(method=method, compile="layers"))
    losses = {}
    for name in ("hf_padded", "hf_padded_compiled", "ours_eager", "ours"):
        step = bench.step(name, workload)
        losses[name] = [step().item() for _ in range(2)]
    for name, pair in losses.items():
        assert pair == pytest.approx([losses["hf_padded"][0]] * 2, rel=1e-5), name
    for name, compiled in (("ours_eager", False), ("ours", True)):
        (layer, *_) = inner(bench.step(name, workload).model).model.layers
        assert (layer.compiled is not None) is compiled
