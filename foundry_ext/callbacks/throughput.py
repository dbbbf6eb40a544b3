"""Throughput in real tokens, packing fill, and what the data lost: what a padded counter hides."""

import time
from collections import deque

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from foundry_ext.data import batch as packs
from foundry_ext.data.dataloader import PackedDataset


class PackedThroughput(Callback):
    """Logs, over a window of batches and all ranks,

    - `throughput/real_tokens_per_sec`, `throughput/loss_tokens_per_sec`,
      `throughput/documents_per_sec` and `throughput/device/real_tokens_per_sec`,
    - `packing/fill`: real tokens over pack capacity, `packing/documents_per_pack`,
    - once, `data/<outcome>`: documents kept, truncated, split or dropped, and tokens cut.

    Evaluation, checkpoints and a process's first batch are not in the time.

    Args:
        window_size: batches to average over.
    """

    def __init__(self, window_size: int = 20):
        if window_size < 1:
            raise ValueError(f"packed_throughput.window_size: {window_size} is below 1")
        # (seconds, real tokens, loss tokens, documents, packs) of this rank
        self.history: deque[tuple[float, int, int, int, int]] = deque(maxlen=window_size)
        self.started: float | None = None
        self.warmed_up = False

    def fit_start(self, state: State, logger: Logger) -> None:
        dataset = getattr(state.train_dataloader, "dataset", None)
        if not isinstance(dataset, PackedDataset):
            raise ValueError("packed_throughput counts packs: use it with a packed_* train loader")
        self.capacity = dataset.sampler.capacity
        counts = dataset.documents.counts
        logger.log_metrics({f"data/{outcome}": count for outcome, count in counts.items()})

    def before_dataloader(self, state: State, logger: Logger) -> None:
        self.started = time.perf_counter()

    def batch_end(self, state: State, logger: Logger) -> None:
        assert self.started is not None
        # Composer has waited for the step: it reads the loss before this event.
        seconds = time.perf_counter() - self.started
        if not self.warmed_up:  # kernels are loaded and compiled in the first batch
            self.warmed_up = True
            return
        tokens = packs.num_tokens(state.batch)
        counted = (tokens["total"], tokens["loss_generating"], packs.num_documents(state.batch))
        self.history.append((seconds, *counted, len(state.batch)))
        self._log(logger)

    def _log(self, logger: Logger) -> None:
        seconds, *counts = (sum(column) for column in zip(*self.history, strict=True))
        ranks = dist.all_gather_object((seconds, *counts))
        # Ranks wait for one another, so the slowest one's time is everybody's.
        slowest = max(rank[0] for rank in ranks)
        real, loss, documents, num_packs = (sum(rank[i] for rank in ranks) for i in range(1, 5))
        logger.log_metrics(
            {
                "throughput/real_tokens_per_sec": real / slowest,
                "throughput/loss_tokens_per_sec": loss / slowest,
                "throughput/documents_per_sec": documents / slowest,
                "throughput/device/real_tokens_per_sec": real / slowest / len(ranks),
                "packing/fill": real / (num_packs * self.capacity),
                "packing/documents_per_pack": documents / num_packs,
            }
        )
