"""Counts and times of training steps, shared by the callbacks that report them."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from transformers import LlamaConfig

from foundry_ext.data.dataset import PackedDataset
from foundry_ext.models.flops import adapter_parameters, peak_flops, training_flops
from foundry_ext.packing.batch import Pack
from foundry_ext.training.model import ComposerSmolLM2
from foundry_ext.utils.errors import UserError


@dataclass
class StepCounts:
    """Counters summed over steps, for one rank or all ranks. All zeros means no step yet.

    The names of the fields are keys in checkpoints, see run_record.
    """

    seconds: float = 0.0
    """From the request for a batch to the end of its step, on the slowest rank."""
    waiting: float = 0.0
    """Part of `seconds` spent waiting for the dataloader, on the slowest rank."""
    real_tokens: int = 0
    loss_tokens: int = 0
    documents: int = 0
    packs: int = 0
    slots: int = 0
    """Tokens computed, padding included."""
    sum_squared_lengths: int = 0

    def __add__(self, other: "StepCounts") -> "StepCounts":
        # By vars because dataclasses.astuple copies deeply, 25 µs, and every batch sums a window.
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return StepCounts(*(a + b for a, b in pairs))

    def packing_efficiency(self, capacity: int) -> float:
        """Return the share of the packs' capacity that real tokens fill, 0 to 1."""
        return self.real_tokens / (self.packs * capacity)


def over_ranks(counts: StepCounts) -> StepCounts:
    """Return the sum over all ranks. A collective, cheap enough for every batch.

    It sends one small tensor: Composer's all_gather_object pickles, gathers twice and makes the
    host wait each time, even in a process group of one rank.
    """
    if dist.get_world_size() == 1:
        return counts
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    fields = vars(counts).values()
    # float64 holds integers exactly up to 2^53.
    mine = torch.tensor(list(fields), dtype=torch.float64, device=device)
    ranks = [
        StepCounts(*(type(field)(value) for field, value in zip(fields, rank, strict=True)))
        for rank in torch.stack(list(dist.all_gather(mine))).tolist()
    ]
    together = sum(ranks, StepCounts())
    # Ranks wait for one another, so the slowest rank's time is everybody's.
    together.seconds = max(rank.seconds for rank in ranks)
    together.waiting = max(rank.waiting for rank in ranks)
    return together


class StepTimer(Callback):
    """Base of callbacks that count this rank's steps.

    Evaluation and checkpoints happen between steps and are not in the time.
    """

    def __init__(self):
        self._requested: float | None = None
        self._waiting = 0.0
        self._warmed_up = False

    def before_dataloader(self, state: State, logger: Logger) -> None:
        self._requested = time.perf_counter()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        assert self._requested is not None
        self._waiting = time.perf_counter() - self._requested

    def finish_step(self, packs: Iterable[Pack]) -> tuple[StepCounts, bool]:
        """Return the step's counts and whether it was the first; to be called at `batch_end`.

        The first step of a process loads and compiles kernels, so it is left out of throughput.
        """
        assert self._requested is not None
        # Composer has waited for the device: it reads the loss before this event.
        counts = StepCounts(time.perf_counter() - self._requested, self._waiting)
        for pack in packs:
            counts.real_tokens += pack["num_tokens"]
            counts.loss_tokens += pack["num_loss_tokens"]
            counts.documents += pack["num_documents"]
            counts.packs += 1
            counts.slots += pack["input_ids"].shape[1]
            counts.sum_squared_lengths += pack["sum_squared_lengths"]
        is_first, self._warmed_up = not self._warmed_up, True
        return counts, is_first


class MFUMeter:
    """MFU: the useful FLOPs of steps as a share of what the GPUs could do in the same time."""

    def __init__(self, state: State):
        self.flops, self.peak = None, device_peak(state)
        model = unwrapped(state)
        if isinstance(model, ComposerSmolLM2):
            self.flops = partial(
                training_flops,
                cast(LlamaConfig, model.inner_model.config),
                frozen_base=model.using_peft,
                adapter_parameters=adapter_parameters(model),
            )

    def of(self, counts: StepCounts) -> float | None:
        """Return the MFU, 0 to 1; None before the first step or if the device's peak is unknown.

        Args:
            counts: of all ranks.
        """
        if not counts.seconds or self.flops is None or self.peak is None:
            return None
        flops = self.flops(
            num_tokens=counts.real_tokens,
            num_loss_tokens=counts.loss_tokens,
            sum_squared_lengths=counts.sum_squared_lengths,
        )
        return flops / (counts.seconds * self.peak * dist.get_world_size())


def device_peak(state: State) -> float | None:
    """Return the GPU's dense bf16 FLOP/s; None on a CPU or for a GPU that models/flops.py lacks."""
    return peak_flops(torch.cuda.get_device_name()) if state.device.name == "gpu" else None


def unwrapped(state: State) -> torch.nn.Module:
    """Return the Composer model, without DDP around it."""
    return state.model.module if state.is_model_ddp else state.model  # pyright: ignore


def packed_dataset(state: State, callback: str) -> PackedDataset:
    """Return the dataset that is trained on.

    Raises:
        UserError: the train loader is not a packed one; names the callback.
    """
    dataset = getattr(state.train_dataloader, "dataset", None)
    if not isinstance(dataset, PackedDataset):
        raise UserError(f"{callback} counts packs: use it with a packed_* train loader")
    return dataset
