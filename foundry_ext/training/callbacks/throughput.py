"""`packed_throughput`: throughput in real tokens, packing efficiency and data lost to packing."""

from collections import deque
from typing import Any, TextIO, cast

from composer.core import Event, State
from composer.loggers import ConsoleLogger, Logger
from composer.utils import create_interval_scheduler, dist

from foundry_ext.training.meter import (
    MFUMeter,
    StepCounts,
    StepTimer,
    over_ranks,
    packed_dataset,
)
from foundry_ext.utils.errors import UserError


class PackedThroughput(StepTimer):
    """Callback that logs throughput, averaged over a window of batches and summed over all ranks.

    - `throughput/real_tokens_per_sec`, `throughput/loss_tokens_per_sec`,
      `throughput/documents_per_sec` and `throughput/device/real_tokens_per_sec`;
    - `throughput/waiting_for_data`: share of the time, 0 to 1;
    - `throughput/device/mfu` if the GPU's peak is known, see models/flops.py;
    - `packing/fill`: real tokens over pack capacity, and `packing/documents_per_pack`;
    - once, `data/<outcome>`: documents kept, truncated, split or dropped, tokens cut, and responses
      of chats that `target_responses` leaves out.

    Evaluation, checkpoints and a process's first batch are not in the time. The packs of the window
    are in the checkpoint, so `packing/...` continues in a resumed run as if it had not stopped; the
    times are of this process alone. If Composer logs to the
    console (`log_to_console`), the same figures are printed at each `console_log_interval`.

    Args:
        window_size: batches to average over.
    """

    def __init__(self, window_size: int = 20):
        super().__init__()
        if window_size < 1:
            raise UserError(f"packed_throughput.window_size: {window_size}; must be at least 1")
        self.history: deque[StepCounts] = deque(maxlen=window_size)  # of this process, all ranks
        self.packing: deque[StepCounts] = deque(maxlen=window_size)  # of the run, all ranks
        self.logged: dict[str, float] = {}
        self.console: ConsoleLogger | None = None
        self.printed = -1  # the batch of the last printed line

    def fit_start(self, state: State, logger: Logger) -> None:
        dataset = packed_dataset(state, "packed_throughput")
        self.capacity = dataset.sampler.capacity
        self.mfu_meter = MFUMeter(state)
        consoles = [x for x in logger.destinations if isinstance(x, ConsoleLogger)]
        self.console = consoles[0] if consoles and dist.get_global_rank() == 0 else None
        if self.console is not None:
            interval = self.console.log_interval
            self.is_due = create_interval_scheduler(
                interval, include_end_of_training=False, checkpoint_events=False
            )
        counts = dataset.documents.counts
        logger.log_metrics({f"data/{outcome}": count for outcome, count in counts.items()})

    def batch_end(self, state: State, logger: Logger) -> None:
        counts, is_first = self.finish_step(state.batch)
        counts = over_ranks(counts)
        if state.timestamp.batch.value == 1:
            return
        self.packing.append(counts)
        metrics = self._measure_packing()
        if not is_first:
            self.history.append(counts)
            self.logged = metrics = {**self._measure(), **metrics}
        logger.log_metrics(metrics)
        self._print_if_due(state, Event.BATCH_END)

    def epoch_end(self, state: State, logger: Logger) -> None:
        self._print_if_due(state, Event.EPOCH_END)

    def fit_end(self, state: State, logger: Logger) -> None:
        if self.console is not None and self.printed != state.timestamp.batch.value:
            self._print(state, self.console)

    def _measure(self) -> dict[str, float]:
        counts = sum(self.history, StepCounts())
        mfu = self.mfu_meter.of(counts)
        real_tokens_per_sec = counts.real_tokens / counts.seconds
        return {
            "throughput/real_tokens_per_sec": real_tokens_per_sec,
            "throughput/loss_tokens_per_sec": counts.loss_tokens / counts.seconds,
            "throughput/documents_per_sec": counts.documents / counts.seconds,
            "throughput/device/real_tokens_per_sec": real_tokens_per_sec / dist.get_world_size(),
            "throughput/waiting_for_data": counts.waiting / counts.seconds,
            **({} if mfu is None else {"throughput/device/mfu": mfu}),
        }

    def _measure_packing(self) -> dict[str, float]:
        counts = sum(self.packing, StepCounts())
        return {
            "packing/fill": counts.packing_efficiency(self.capacity),
            "packing/documents_per_pack": counts.documents / counts.packs,
        }

    def state_dict(self) -> Any:
        """Return [real tokens, documents, packs] of each step that `packing/...` averages over."""
        return [[step.real_tokens, step.documents, step.packs] for step in self.packing]

    def load_state_dict(self, state: Any) -> None:
        """Continue that window; the state of an earlier version is an empty mapping."""
        for real_tokens, documents, packs in state:
            step = StepCounts(real_tokens=real_tokens, documents=documents, packs=packs)
            self.packing.append(step)

    def _print_if_due(self, state: State, event: Event) -> None:
        if self.console is not None and self.is_due(state, event):
            self._print(state, self.console)

    def _print(self, state: State, console: ConsoleLogger) -> None:
        """Print one line for people; Composer's console prints a line per metric, about twenty."""
        if self.logged:
            self.printed = state.timestamp.batch.value
            text = f"[batch={self.printed}] {as_text(self.logged)}"
            print(text, file=cast(TextIO, console.stream), flush=True)


def as_text(logged: dict[str, float]) -> str:
    """Return the figures in a line: `81,234 real tokens/s (40,617 with loss), MFU 35.2 %, ...`."""
    mfu = logged.get("throughput/device/mfu")
    return ", ".join(
        [
            f"{logged['throughput/real_tokens_per_sec']:,.0f} real tokens/s"
            f" ({logged['throughput/loss_tokens_per_sec']:,.0f} with loss)",
            *([] if mfu is None else [f"MFU {100 * mfu:.1f} %"]),
            f"packs {100 * logged['packing/fill']:.1f} % full",
            f"data wait {100 * logged['throughput/waiting_for_data']:.1f} %",
        ]
    )
