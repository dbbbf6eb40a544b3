"""`guard`: stops or skips a step whose loss or gradient is non-finite or spikes."""

import logging
import math
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any, cast

import torch
from composer.core import Algorithm, Callback, Event, Precision, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from foundry_ext.data.dataset import PackedDataset
from foundry_ext.models.checks import IdsOutside, check_ids
from foundry_ext.packing.batch import Pack
from foundry_ext.training.meter import packed_dataset, unwrapped
from foundry_ext.training.outlier_documents import describe_outliers, measure_documents
from foundry_ext.training.weight_checks import START_AGAIN, describe_corrupted_weights
from foundry_ext.utils.errors import UserError

log = logging.getLogger(__name__)

ACTIONS = ("stop", "skip")
WINDOW = 64  # steps whose median norm a step is compared with
ENOUGH = 16  # steps before the median is meaningful
MOST_IN_A_ROW = 5  # skipped steps, after which the documents are not the cause


class Guard(Callback):
    """Callback that checks every step's losses and gradient norm before the optimizer uses them.

    A step is *wrong* if a loss or the norm is not finite on any rank, or the norm is more than
    `spike_factor` times the median of the last 64 steps. The documents of a wrong step are measured
    one by one and the outliers named. Then the run stops, or skips the step and continues. It
    always stops if weights are not finite, and at the sixth wrong step in a row.

    A skipped step changes no weight and no optimizer state. Its tokens and batch number count, and
    the schedule continues. Logged are `guard/gradient_norm`, before clipping, and `guard/skipped`,
    the skipped steps so far. The cost is one pass over the gradients, as for clipping, and one wait
    of the host for the device.

    Ids and labels outside the vocabulary are reported with their document before they are computed
    with. Under `amp_fp16` infinite gradients are left to Composer's scaler, which skips those steps
    itself.

    Args:
        action: stop or skip.
        spike_factor: multiple of the median norm, above 1.
    """

    def __init__(self, action: str = "stop", spike_factor: float = 20.0):
        if action not in ACTIONS:
            raise UserError(f"guard.action: {action!r}; choose one of {', '.join(ACTIONS)}")
        if isinstance(spike_factor, bool) or not spike_factor > 1:
            raise UserError(f"guard.spike_factor: {spike_factor!r}; must be a number above 1")
        self.action, self.spike_factor = action, spike_factor
        self.losses: list[Tensor] = []  # of a step's microbatches on this rank
        self.norms: deque[float] = deque(maxlen=WINDOW)  # of steps that were taken
        self.skipped = self.in_a_row = 0

    def init(self, state: State, logger: Logger) -> None:
        # An algorithm, because algorithms run before callbacks and clipping is an algorithm. At the
        # end of the list, because at an `after_` event the last algorithm runs first
        # (composer.core.passes.set_filo_order).
        state.algorithms.append(_BeforeClipping(self))

    def fit_start(self, state: State, logger: Logger) -> None:
        self.dataset = packed_dataset(state, "guard")
        config = getattr(getattr(unwrapped(state), "model", None), "config", None)
        self.vocabulary = getattr(config, "vocab_size", None)

    def before_train_batch(self, state: State, logger: Logger) -> None:
        self.losses = []
        if isinstance(self.vocabulary, int):
            _check_on_the_host(state, self.dataset, self.vocabulary)

    def after_loss(self, state: State, logger: Logger) -> None:
        assert isinstance(state.loss, Tensor)
        self.losses.append(state.loss.detach().float())

    def judge(self, state: State, logger: Logger) -> None:
        """Stop the run or drop the step's gradients if the step is wrong. A collective.

        To be called when the gradients of all microbatches are there.

        Raises:
            FloatingPointError: the run must stop; raised on all ranks.
        """
        num_bad, norm = self._measure(state)
        logger.log_metrics({"guard/gradient_norm": norm})
        problem = self._problem(num_bad, norm, state)
        if problem is None:
            self.in_a_row = 0
            if math.isfinite(norm):
                self.norms.append(norm)
            return
        description = self._describe(problem, state)
        for optimizer in state.optimizers:
            # None instead of zeros: with zero gradients weight decay and momentum still apply.
            optimizer.zero_grad(set_to_none=True)
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        logger.log_metrics({"guard/skipped": self.skipped})
        if dist.get_global_rank() == 0:
            log.warning("%s. The step was skipped", description)

    def _measure(self, state: State) -> tuple[int, float]:
        """Return the number of non-finite losses and the gradient norm, the same on all ranks."""
        gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
        shards = [x.to_local() if isinstance(x, DTensor) else x for x in gradients]
        square = torch.nn.utils.get_total_norm(shards).float().square()
        bad = torch.stack([loss.reshape(()) for loss in self.losses]).isfinite().logical_not().sum()
        sums = torch.stack([bad.to(square), square])
        dist.all_reduce(sums)
        num_bad, total = _read(sums)
        # Under DDP every rank has the complete gradient, under FSDP a part of it.
        total /= 1 if _is_sharded(state) else dist.get_world_size()
        return int(num_bad), math.sqrt(total)

    def _problem(self, num_bad: int, norm: float, state: State) -> str | None:
        if num_bad:
            return "the loss is not finite"
        if not math.isfinite(norm):
            scaled = state.precision == Precision.AMP_FP16
            return None if scaled else "the gradient is not finite"
        usual = median(self.norms) if len(self.norms) >= ENOUGH else math.inf
        if norm > self.spike_factor * usual:
            return (
                f"the gradient norm, {norm:.4g}, is {norm / usual:.0f} times the median of the last"
                f" {len(self.norms)} steps, {usual:.4g}"
            )
        return None

    def _describe(self, problem: str, state: State) -> str:
        """Return what is wrong and where.

        Raises:
            FloatingPointError: the run cannot continue, or is not to.
        """
        clock = state.timestamp
        description = f"guard: batch {clock.batch.value} (epoch {clock.epoch.value}): {problem}"
        unchanged = "This batch changed no weight"
        corrupted = describe_corrupted_weights(state)
        if corrupted:
            raise FloatingPointError(
                f"{description}, and {corrupted} of the weights are not finite either. {unchanged},"
                f" but an earlier one corrupted them: {START_AGAIN}"
            )
        documents = measure_documents(state, self.dataset, measure_gradients=not _is_sharded(state))
        description += f"; {describe_outliers(documents)}"
        if self.action == "stop":
            raise FloatingPointError(
                f"{description}. {unchanged}. Correct or remove the documents, or set"
                " callbacks.guard.action: skip to continue without such batches; if a spike is"
                " harmless, raise callbacks.guard.spike_factor"
            )
        if self.in_a_row == MOST_IN_A_ROW:
            raise FloatingPointError(
                f"{description}. {unchanged}, nor did the {MOST_IN_A_ROW} before it, which were"
                f" skipped too: {START_AGAIN}"
            )
        return description

    def state_dict(self) -> dict[str, Any]:
        return {"norms": list(self.norms), "skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.norms.extend(state["norms"])
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]


class _BeforeClipping(Algorithm):
    """Algorithm that calls the guard once gradients are complete and unscaled, before clipping."""

    def __init__(self, guard: Guard):
        self.guard = guard

    def match(self, event: Event, state: State) -> bool:
        return event == Event.AFTER_TRAIN_BATCH

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        self.guard.judge(state, logger)


def _check_on_the_host(state: State, dataset: PackedDataset, vocabulary: int) -> None:
    """Check ids and labels while the batch is still on the CPU.

    The model checks them too, but on a GPU a failed check ends the process without naming the
    document.

    Raises:
        UserError: an id or label is outside the vocabulary; names its document.
    """
    packs = cast(Sequence[Pack], state.batch)
    for index, pack in enumerate(packs):
        try:
            check_ids(pack["input_ids"], pack["labels"], vocabulary)
        except IdsOutside as error:
            documents = dataset.sampler.batch(dataset.next_batch - 1)[index]
            row = torch.searchsorted(pack["cu_seqlens"], error.index, right=True) - 1
            name = dataset.name_document(int(documents[int(row)]))
            raise UserError(f"guard: {name}: {error}") from error


def _is_sharded(state: State) -> bool:
    return state.fsdp_config is not None


def _read(values: Tensor) -> list[float]:
    """Return the values; the only place where the host waits for the device."""
    return values.tolist()
