"""Throughput in real tokens, packing fill, and what the data lost: what a padded counter hides."""

from collections import deque

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from foundry_ext.callbacks.meter import (
    Counts,
    Meter,
    over_ranks,
    packed_dataset,
    total,
    utilisation,
)


class PackedThroughput(Callback):
    """Logs, over a window of batches and all ranks,

    - `throughput/real_tokens_per_sec`, `throughput/loss_tokens_per_sec`,
      `throughput/documents_per_sec` and `throughput/device/real_tokens_per_sec`,
    - `throughput/waiting_for_data`: share of the time, 0 to 1,
    - `throughput/device/mfu` where the GPU's peak is known, see models/flops.py,
    - `packing/fill`: real tokens over pack capacity, `packing/documents_per_pack`,
    - once, `data/<outcome>`: documents kept, truncated, split or dropped, and tokens cut.

    Evaluation, checkpoints and a process's first batch are not in the time.

    Args:
        window_size: batches to average over.
    """

    def __init__(self, window_size: int = 20):
        if window_size < 1:
            raise ValueError(f"packed_throughput.window_size: {window_size} is below 1")
        self.history: deque[Counts] = deque(maxlen=window_size)  # of this rank
        self.meter = Meter()

    def fit_start(self, state: State, logger: Logger) -> None:
        dataset = packed_dataset(state, "packed_throughput")
        self.capacity = dataset.sampler.capacity
        counts = dataset.documents.counts
        logger.log_metrics({f"data/{outcome}": count for outcome, count in counts.items()})

    def before_dataloader(self, state: State, logger: Logger) -> None:
        self.meter.before_dataloader()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        self.meter.after_dataloader()

    def batch_end(self, state: State, logger: Logger) -> None:
        counts, first = self.meter.batch_end(state.batch)
        if not first:
            self.history.append(counts)
            self._log(state, logger)

    def _log(self, state: State, logger: Logger) -> None:
        counts = over_ranks(total(self.history))
        mfu = utilisation(state, counts)
        logger.log_metrics(
            {
                "throughput/real_tokens_per_sec": counts.real_tokens / counts.seconds,
                "throughput/loss_tokens_per_sec": counts.loss_tokens / counts.seconds,
                "throughput/documents_per_sec": counts.documents / counts.seconds,
                "throughput/device/real_tokens_per_sec": (
                    counts.real_tokens / counts.seconds / dist.get_world_size()
                ),
                "throughput/waiting_for_data": counts.waiting / counts.seconds,
                **({} if mfu is None else {"throughput/device/mfu": mfu}),
                "packing/fill": counts.real_tokens / (counts.packs * self.capacity),
                "packing/documents_per_pack": counts.documents / counts.packs,
            }
        )
