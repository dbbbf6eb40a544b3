"""`guard`: numbers that go wrong are found before the optimizer makes weights of them."""

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
from foundry_ext.training.suspects import describe_suspects, find_suspects, spoilt_weights
from foundry_ext.utils.errors import UserError

log = logging.getLogger(__name__)

ACTIONS = ("stop", "skip")
WINDOW = 64  # steps whose median norm a step is held against
ENOUGH = 16  # of them, before there is a median worth the name
MOST_IN_A_ROW = 5  # skipped steps, after which it is not the documents
_ANEW = (
    "begin anew with a lower optimizer.lr, in another save_folder, from the base model or, by"
    " load_path and load_weights_only: true, from an earlier checkpoint"
)


class Guard(Callback):
    """Looks at every step's losses and gradient norm, all ranks', before anything is updated.

    A loss or norm that is not finite, or a norm above `spike_factor` times the median of the last
    64 steps, is *wrong*. The documents that give it are measured one by one and named by their
    numbers, and the step is not taken: the run stops, or goes on without it. Weights that are not
    finite themselves end a run in any case, and so does a sixth skipped step in a row.

    A skipped step changes no weight and no optimizer state; its tokens and batch number count, and
    the schedule goes on. Logs `guard/gradient_norm`, before clipping, and `guard/skipped`, so far.
    Costs a reading of the gradients, as clipping does, and one value for the host to wait for.
    Ids and labels outside the vocabulary are named with their document before they are computed.
    Under `amp_fp16` infinite gradients are left to Composer's scaler, which skips those itself.

    Args:
        action: stop or skip.
        spike_factor: times the median, above 1.
    """

    def __init__(self, action: str = "stop", spike_factor: float = 20.0):
        if action not in ACTIONS:
            raise UserError(f"guard.action: {action!r}; choose one of {', '.join(ACTIONS)}")
        if isinstance(spike_factor, bool) or not spike_factor > 1:
            raise UserError(f"guard.spike_factor: {spike_factor!r}; give a number above 1")
        self.action, self.spike_factor = action, spike_factor
        self.losses: list[Tensor] = []  # of a step's microbatches on this rank
        self.norms: deque[float] = deque(maxlen=WINDOW)  # of steps taken
        self.skipped = self.in_a_row = 0

    def init(self, state: State, logger: Logger) -> None:
        # Algorithms run before callbacks, and clipping is one. Those at an `after_` event run last
        # to first, hence at the end (composer.core.passes.set_filo_order).
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
        """To be called by all ranks, with the gradients of the whole step.

        Raises:
            FloatingPointError: on all ranks, where the run is to stop.
        """
        num_bad, norm = self._measure(state)
        logger.log_metrics({"guard/gradient_norm": norm})
        problem = self._problem(num_bad, norm, state)
        if problem is None:
            self.in_a_row = 0
            if math.isfinite(norm):
                self.norms.append(norm)
            return
        found = self._describe(problem, state)
        for optimizer in state.optimizers:
            # Without gradients, rather than with zeros: those would still decay and use momentum.
            optimizer.zero_grad(set_to_none=True)
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        logger.log_metrics({"guard/skipped": self.skipped})
        if dist.get_global_rank() == 0:
            log.warning("%s. The step was skipped", found)

    def _measure(self, state: State) -> tuple[int, float]:
        """Losses that are not finite, and the norm; of all ranks, so that all decide the same."""
        gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
        shards = [x.to_local() if isinstance(x, DTensor) else x for x in gradients]
        square = torch.nn.utils.get_total_norm(shards).float().square()
        bad = torch.stack([loss.reshape(()) for loss in self.losses]).isfinite().logical_not().sum()
        found = torch.stack([bad.to(square), square])
        dist.all_reduce(found)
        num_bad, total = _read(found)
        # DDP's ranks have the same gradient, FSDP's a part of it each.
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
        """What is wrong and where.

        Raises:
            FloatingPointError: and the run cannot, or is not to, go on.
        """
        clock = state.timestamp
        where = f"guard: batch {clock.batch.value} (epoch {clock.epoch.value}): {problem}"
        unchanged = "No weight was changed by this batch"
        spoilt = spoilt_weights(state)
        if spoilt:
            raise FloatingPointError(
                f"{where}, and {spoilt} of the weights it came from. {unchanged}, but an earlier"
                f" one spoilt them: {_ANEW}"
            )
        suspects = find_suspects(state, self.dataset, measure_gradients=not _is_sharded(state))
        found = f"{where}; {describe_suspects(suspects)}"
        if self.action == "stop":
            raise FloatingPointError(
                f"{found}. {unchanged}. Correct or remove the documents; or let the run go on"
                " without such batches, callbacks.guard.action: skip; for a spike that is none,"
                " raise callbacks.guard.spike_factor"
            )
        if self.in_a_row == MOST_IN_A_ROW:
            raise FloatingPointError(
                f"{found}. {unchanged}, nor by the {MOST_IN_A_ROW} before it, which were skipped"
                f" too: {_ANEW}"
            )
        return found

    def state_dict(self) -> dict[str, Any]:
        kept = {"norms": list(self.norms), "skipped": self.skipped, "in_a_row": self.in_a_row}
        return kept

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.norms.extend(state["norms"])
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]


class _BeforeClipping(Algorithm):
    """Calls the guard when a step's gradients are complete, unscaled and not clipped yet."""

    def __init__(self, guard: Guard):
        self.guard = guard

    def match(self, event: Event, state: State) -> bool:
        return event == Event.AFTER_TRAIN_BATCH

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        self.guard.judge(state, logger)


def _check_on_the_host(state: State, dataset: PackedDataset, vocabulary: int) -> None:
    """As the model does, but while the batch has yet to go to the device, where a failed check ends
    the process without a word on which document it was.

    Raises:
        UserError: an id or label outside the vocabulary; names its document.
    """
    packs = cast(Sequence[Pack], state.batch)
    for number, pack in enumerate(packs):
        try:
            check_ids(pack["input_ids"], pack["labels"], vocabulary)
        except IdsOutside as error:
            documents = dataset.sampler.batch(dataset.next_batch - 1)[number]
            place = torch.searchsorted(pack["cu_seqlens"], error.index, right=True) - 1
            name = dataset.name_document(int(documents[int(place)]))
            raise UserError(f"guard: {name}: {error}") from error


def _is_sharded(state: State) -> bool:
    return state.fsdp_config is not None


def _read(found: Tensor) -> list[float]:
    """The one place where the host waits for the device."""
    return found.tolist()
