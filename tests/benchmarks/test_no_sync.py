"""Our steps (forward, backward, optimizer) never make the host wait for the device."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.variants import Bench, Setup
from benchmarks.workloads import packed_workload
from foundry_ext.models import smollm2

# What reads a value on the host, or has a shape that depends on one.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero"}


class NoWaiting(TorchDispatchMode):
    """Mode that fails on operators for which a GPU's queue would have to run empty.

    It does not look inside our own operators, such as a CPU's attention, which reads lengths.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        if name in WAITING:
            raise AssertionError(f"{name} waits for the device")
        if name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1]):
            raise AssertionError("indexing by a mask waits for the device")
        return func(*args, **(kwargs or {}))


def leave_checks_to_the_device(monkeypatch):
    """Disable the checks: on a GPU they are asynchronous, but on a CPU they read the values."""
    for name in ("check_ids", "check_packed"):
        monkeypatch.setattr(smollm2, name, lambda *arguments: None)


@pytest.mark.parametrize("method", ["full", "lora", "dora", "rslora"])
@pytest.mark.parametrize("precision", ["bf16", "amp_bf16"])
def test_no_operator_of_a_step_waits(method, precision, workload, make_setup, monkeypatch):
    leave_checks_to_the_device(monkeypatch)
    step = Bench(make_setup(method=method, precision=precision)).step("ours", workload)
    step()
    with NoWaiting():
        step()


def test_a_step_that_counts_its_labels_waits(workload, make_setup, monkeypatch):
    leave_checks_to_the_device(monkeypatch)
    step = Bench(make_setup()).step("ours", workload)
    for batch in step.batches:
        del batch["num_loss_tokens"]
    with NoWaiting(), pytest.raises(AssertionError, match="waits for the device"):
        step()


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["full", "lora", "dora", "rslora"])
@pytest.mark.parametrize("compiled", ["none", "layers"])
def test_no_step_waits_for_the_gpu(method, compiled):
    setup = Setup(device="cuda", method=method, precision="amp_bf16", compile=compiled)
    setup = dataclasses.replace(setup, config_overrides={"num_hidden_layers": 2})
    vocabulary = setup.config().vocab_size
    workload = packed_workload(
        "a", vocabulary=vocabulary, labelled=0.5, pack_tokens=4096, num_packs=2, microbatches=(4,)
    )
    step = Bench(setup).step("ours", workload)
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(RuntimeError, match="synchroniz"):  # the mode would have said so
        torch.cuda.set_sync_debug_mode("error")
        try:
            step().item()
        finally:
            torch.cuda.set_sync_debug_mode("default")
