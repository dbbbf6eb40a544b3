"""Gradients after Composer's own microbatching, against stock models on padded batches.

The reference is one padded batch through transformers (and peft), its loss the mean over all
labelled tokens. Composer weighs each microbatch's mean by its share of them, so the way in which a
batch is split must not matter. (Traps 5, 6, 18.)
"""

import pytest
import torch

from tests.tiers import one_of
from tests.training import kit


@pytest.fixture(scope="module")
def adapters(world, tmp_path_factory):
    """Return a folder per method whose adapter has an effect."""
    folders = {}
    for method in kit.ADAPTERS:
        model = kit.build(world, method=method)
        kit.randomise_adapter(model)
        for adapter in model.model.peft_config.values():
            adapter.lora_dropout = 0.0
        folders[method] = tmp_path_factory.mktemp(method)
        model.model.save_pretrained(folders[method])
    return folders


def captured(world, folder, adapter=None, **overrides):
    """Return a run that only records gradients over an epoch, and a stock model of its weights."""
    if adapter is not None:
        overrides["model__pretrained_lora_id_or_path"] = str(adapter)
    settings = {
        "callbacks": {"spy": {"keep_gradients": True}},
        "optimizer__lr": 0.0,
        "algorithms": {},  # clipping would come before the spy
        "max_duration": "1ep",
        "global_train_batch_size": 4,
        "save_folder": None,
    }
    run = kit.run(kit.run_config(world, folder, **settings | overrides))
    return run, kit.stock_model(world, run.trainer.state.model)


def assert_gradients_are_theirs(run, theirs):
    assert len(run.spy.batches) == len(run.spy.gradients) > 1
    for packs, gradients in zip(run.spy.batches, run.spy.gradients, strict=True):
        kit.assert_same_gradients(gradients, kit.their_gradients(theirs, packs))


@pytest.mark.parametrize("packs_per_microbatch", [1, 2, 3, 4])
def test_of_any_microbatching(world, tmp_path, packs_per_microbatch):
    run, theirs = captured(world, tmp_path, device_train_microbatch_size=packs_per_microbatch)
    counts = [[pack["num_loss_tokens"] for pack in packs] for packs in run.spy.batches]
    assert all(len(set(of_batch)) > 1 for of_batch in counts), "equal weights would prove nothing"
    assert 0 in counts[-1], "the last batch is to be completed with an empty pack"
    assert_gradients_are_theirs(run, theirs)


def test_of_one_pack_that_holds_the_batch(world, tmp_path):
    run, theirs = captured(
        world, tmp_path, train_loader__dataset__pack_tokens=512, global_train_batch_size=1
    )
    assert_gradients_are_theirs(run, theirs)


@pytest.mark.parametrize("method", one_of(kit.ADAPTERS, "dora"))
def test_of_adapters(world, tmp_path, adapters, method):
    run, theirs = captured(world, tmp_path, adapters[method], device_train_microbatch_size=3)
    assert_gradients_are_theirs(run, theirs)


def test_of_fixed_shapes(world, tmp_path):
    """The padding at a pack's end carries no weight."""
    run, theirs = captured(world, tmp_path, train_loader__dataset__fixed_shape=True)
    assert {pack["input_ids"].shape for packs in run.spy.batches for pack in packs} == {(1, 64)}
    for batch in run.spy.batches:
        for pack in batch:
            pack["cu_seqlens"] = pack["cu_seqlens"][: pack["num_documents"] + 1]
    assert_gradients_are_theirs(run, theirs)


def test_the_logged_loss_is_that_mean_too(world, tmp_path):
    run, theirs = captured(world, tmp_path, device_train_microbatch_size=3)
    for packs, logged in zip(run.spy.batches, run.losses, strict=True):
        loss, count, _ = kit.their_sums(theirs, packs)
        assert logged == pytest.approx(loss.item() / count, rel=1e-6)


def test_a_pack_without_labels_gives_zeros_not_nan(world):
    """Every parameter gets a gradient, so that other ranks do not wait. (Trap 6.)"""
    model = kit.build(world).train()
    model(kit.make_pack([])).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.equal(
            parameter.grad, torch.zeros_like(parameter)
        ), name
