"""Runs by llm-foundry's train command: trained weights, duration, equality with stock training."""

import numpy as np
import pytest
import torch
from composer import Trainer
from composer.algorithms import GradientClipping
from composer.core import DataSpec
from composer.loggers import InMemoryLogger
from composer.optim import DecoupledAdamW

from tests.tiers import one_of
from tests.training import kit


@pytest.mark.parametrize("method", one_of(kit.METHODS, "lora"))
def test_the_loss_falls_and_only_the_method_s_weights_move(world, finished, method):
    run = finished(method).run
    assert np.mean(run.losses[-2:]) < np.mean(run.losses[:2]) - 0.3
    before = kit.build(world, method=method).model.state_dict()
    after = run.weights
    assert before.keys() == after.keys()
    for name, weight in after.items():
        if method == "full" or "lora_B" in name or "magnitude" in name:
            assert not torch.equal(weight, before[name]), name
        elif "lora_A" not in name:  # those start at random
            assert torch.equal(weight, before[name]), name


@pytest.mark.parametrize("method", one_of(kit.ADAPTERS, "lora"))
def test_every_adapter_matrix_moves(finished, method):
    folder = finished(method).folder
    early, late = (
        torch.load(kit.checkpoint(folder, batch), weights_only=False)["state"]["model"]
        for batch in (1, 8)
    )
    assert early.keys() == late.keys()
    assert all("lora_" in name for name in late)
    assert all(not torch.equal(early[name], late[name]) for name in late)


def test_two_epochs_are_an_exact_number_of_batches(finished):
    """The learning rate, which depends on it, ends where it should. (Trap 12.)"""
    run = finished("full").run
    loader = run.trainer.state.train_dataloader
    total = 2 * len(loader)
    assert len(run.losses) == len(run.spy.batches) == run.trainer.state.timestamp.batch == total
    assert run.trainer.state.timestamp.epoch == 2
    warmup = 2
    # Composer steps a scheduler before its clock, so the rate is that of the previous batch.
    clock = [0, *range(total - 1)]
    expected = [0.01 * min(t / warmup, (total - t) / (total - warmup)) for t in clock]
    assert run.spy.rates == pytest.approx(expected)


def test_samples_are_documents_and_tokens_are_real(finished):
    """The clock counts documents as samples, and no padding as tokens. (Traps 14, 26.)"""
    run = finished("full").run
    clock = run.trainer.state.timestamp
    documents = [kit.documents_of(batch) for batch in run.spy.batches]
    assert clock.sample == sum(map(len, documents)) == 2 * 40
    assert clock.token == sum(len(ids) for batch in documents for ids, _ in batch)
    assert clock.token < sum(p["input_ids"].numel() for b in run.spy.batches for p in b)  # padding
    samples = np.cumsum([0, *map(len, documents)])
    assert run.logged("time/sample") == samples.tolist()


@pytest.mark.parametrize("unit", ["sp", "tok"])
def test_a_duration_in_samples_or_tokens_counts_documents_or_real_tokens(world, tmp_path, unit):
    limit = {"sp": 25, "tok": 400}[unit]
    settings = {"max_duration": f"{limit}{unit}", "save_folder": None}
    settings["scheduler__t_warmup"] = f"0{unit}"
    run = kit.run(kit.run_config(world, tmp_path, **settings))
    documents = [kit.documents_of(batch) for batch in run.spy.batches]
    sizes = [len(d) if unit == "sp" else sum(len(ids) for ids, _ in d) for d in documents]
    assert sum(sizes[:-1]) < limit <= sum(sizes)


def test_the_second_epoch_has_all_documents_in_another_order(finished):
    """A sampler must know that an epoch has ended. (Trap 43.)"""
    batches = finished("full").run.spy.batches
    epochs = [
        [tuple(ids.tolist()) for batch in half for ids, _ in kit.documents_of(batch)]
        for half in (batches[: len(batches) // 2], batches[len(batches) // 2 :])
    ]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]


def train_stock(model, batches):
    """Return losses of stock padded training, three sequences per microbatch, token-weighted."""
    padded = [kit.pad(kit.documents_of(batch)) for batch in batches]

    def count(batch):
        return {
            "total": int(batch["attention_mask"].sum()),
            "loss_generating": int((batch["labels"][:, 1:] != -100).sum()),
        }

    memory = InMemoryLogger()
    trainer = Trainer(
        model=model,
        train_dataloader=DataSpec(padded, get_num_tokens_in_batch=count),
        optimizers=DecoupledAdamW(
            [p for p in model.parameters() if p.requires_grad],
            lr=0.003,
            betas=(0.9, 0.95),
            weight_decay=0.0,
        ),
        algorithms=GradientClipping(clipping_type="norm", clipping_threshold=1.0),
        max_duration=f"{len(padded)}ba",
        device_train_microbatch_size=3,
        accumulate_train_batch_on_tokens=True,
        precision="fp32",
        device="cpu",
        loggers=memory,
        progress_bar=False,
    )
    trainer.fit()
    trainer.close()
    return [float(value) for _, value in memory.data["loss/train/total"]]


@pytest.mark.parametrize("method", ["full", "dora"])
def test_fifty_steps_are_those_of_hf_causal_lm(world, tmp_path, method):
    """Stock training on the same weights and documents, padded, has the same losses in fp32.

    Measured on two x86 cores: at most 2e-7 apart, relative.
    """
    start = {}
    if method != "full":
        model = kit.build(world, method=method)
        kit.randomise_adapter(model)
        model.model.save_pretrained(tmp_path / "start")
        start = {"pretrained_lora_id_or_path": str(tmp_path / "start")}
    settings = {"max_duration": "50ba", "optimizer__lr": 0.003, "save_folder": None}
    settings |= {f"model__{key}": value for key, value in start.items()}
    ours = kit.run(kit.run_config(world, tmp_path, **settings))
    stock = kit.build(world, name="hf_causal_lm", use_train_metrics=False, **start)
    theirs = train_stock(stock, ours.spy.batches)
    difference = np.abs(np.array(ours.losses) - theirs) / theirs
    assert len(theirs) == 50 and theirs[-1] < theirs[0] - 1
    assert difference.max() < 5e-6, difference
