"""What training steps did and how long they took: counted once for the callbacks that report it."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from composer.core import State
from composer.utils import dist
from transformers import LlamaConfig

from foundry_ext.data.dataset import PackedDataset
from foundry_ext.models.flops import adapter_parameters, peak_flops, training_flops
from foundry_ext.packing.batch import Pack
from foundry_ext.training.model import ComposerSmolLM2
from foundry_ext.utils.errors import UserError


@dataclass
class Counts:
    """Of some steps on one rank or on all; zero of everything is no step."""

    seconds: float = 0.0
    """From asking for the batch to the end of the step; that of the slowest rank."""
    waiting: float = 0.0
    """Of which the batch was waited for; again the most any rank did."""
    real_tokens: int = 0
    loss_tokens: int = 0
    documents: int = 0
    packs: int = 0
    slots: int = 0
    """Tokens computed, filled ones included."""
    sum_squared_lengths: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        # vars, for dataclasses.astuple copies deeply: 25 µs, and a window is summed every batch.
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Counts(*(a + b for a, b in pairs))


def total(counts: Iterable[Counts]) -> Counts:
    return sum(counts, Counts())


def over_ranks(counts: Counts) -> Counts:
    """Of all ranks; to be called by all of them, and cheap enough for every batch.

    One small tensor: Composer's all_gather_object pickles, gathers twice and makes the host wait
    for each, in a process group of one rank too.
    """
    if dist.get_world_size() == 1:
        return counts
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    fields = vars(counts).values()
    mine = torch.tensor(list(fields), dtype=torch.float64, device=device)  # whole up to 2^53
    ranks = [
        Counts(*(type(field)(value) for field, value in zip(fields, rank, strict=True)))
        for rank in torch.stack(list(dist.all_gather(mine))).tolist()
    ]
    together = total(ranks)
    # Ranks wait for one another, so the slowest one's time is everybody's.
    together.seconds = max(rank.seconds for rank in ranks)
    together.waiting = max(rank.waiting for rank in ranks)
    return together


class Meter:
    """Measures this rank's steps; its methods are to be called at Composer's events of their name.

    Evaluation and checkpoints lie between steps and are not in the time.
    """

    def __init__(self):
        self.started: float | None = None
        self.waited = 0.0
        self.warmed_up = False

    def before_dataloader(self) -> None:
        self.started = time.perf_counter()

    def after_dataloader(self) -> None:
        assert self.started is not None
        self.waited = time.perf_counter() - self.started

    def batch_end(self, packs: Iterable[Pack]) -> tuple[Counts, bool]:
        """The step's counts, and whether it was the process's first one, which loads and compiles
        kernels and so belongs in no throughput."""
        assert self.started is not None
        # Composer has waited for the step: it reads the loss before this event.
        seconds = time.perf_counter() - self.started
        counts = Counts(seconds, self.waited)
        for pack in packs:
            counts.real_tokens += pack["num_tokens"]
            counts.loss_tokens += pack["num_loss_tokens"]
            counts.documents += pack["num_documents"]
            counts.packs += 1
            counts.slots += pack["input_ids"].shape[1]
            counts.sum_squared_lengths += pack["sum_squared_lengths"]
        first, self.warmed_up = not self.warmed_up, True
        return counts, first


def unwrapped(state: State) -> torch.nn.Module:
    """The Composer model, without DDP around it."""
    return state.model.module if state.is_model_ddp else state.model  # pyright: ignore


def packed_dataset(state: State, callback: str) -> PackedDataset:
    """What is trained on.

    Raises:
        UserError: the train loader is not of packs.
    """
    dataset = getattr(state.train_dataloader, "dataset", None)
    if not isinstance(dataset, PackedDataset):
        raise UserError(f"{callback} counts packs: use it with a packed_* train loader")
    return dataset


class Utilisation:
    """MFU: useful FLOPs of steps over what the GPUs could have done in their time."""

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

    def of(self, counts: Counts) -> float | None:
        """Of `counts`, which are of all ranks; None before the first step, without a GPU, or where
        its peak (dense bf16) is not known."""
        if not counts.seconds or self.flops is None or self.peak is None:
            return None
        flops = self.flops(
            num_tokens=counts.real_tokens,
            num_loss_tokens=counts.loss_tokens,
            sum_squared_lengths=counts.sum_squared_lengths,
        )
        return flops / (counts.seconds * self.peak * dist.get_world_size())


def device_peak(state: State) -> float | None:
    """Dense bf16 FLOP/s of the GPU, or None: no GPU, or one that models/flops.py does not know."""
    return peak_flops(torch.cuda.get_device_name()) if state.device.name == "gpu" else None
