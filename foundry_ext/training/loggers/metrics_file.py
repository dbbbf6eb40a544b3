"""`metrics_file`: writes every logged number as JSON lines, readable without a server."""

from pathlib import Path
from typing import Any

from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist

from foundry_ext.config.outputs import METRICS
from foundry_ext.training.run_files import run_files
from foundry_ext.utils.json_lines import HeldLines, read_lines


class MetricsFile(LoggerDestination):
    """Logger that appends lines like {"batch": 20, "token": 81920, "loss/train/total": 3.1}.

    `batch` and `token` (real tokens) are the progress of training. A resumed run continues the
    file: batches after the checkpoint have two lines, of which the later one counts. The file is
    opened when the first step has ended; lines of the evaluation before it are held back until
    then.

    Args:
        path: the file; `{run_name}` is replaced.
    """

    def __init__(self, path: str):
        self.path = path
        self.lines: HeldLines | None = None
        self.state: State | None = None

    def init(self, state: State, logger: Logger) -> None:
        path = run_files(state).add(METRICS, self.path)
        if dist.get_global_rank() == 0:
            self.state, self.lines = state, HeldLines(path)

    def after_load(self, state: State, logger: Logger) -> None:
        """Refuse a file of another run, before the first evaluation."""
        run_files(state).settle(state)

    def batch_end(self, state: State, logger: Logger) -> None:
        self._open(state)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Open the file of a resumed run that had no batch left to train."""
        self._open(state)

    def _open(self, state: State) -> None:
        if self.lines is not None:
            self.lines.open(resumed=run_files(state).continues)

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if self.lines is None or self.state is None:
            return
        numbers = {name: float(value) for name, value in metrics.items()}
        clock = self.state.timestamp
        self.lines.write([{"batch": clock.batch.value, "token": clock.token.value, **numbers}])

    def post_close(self) -> None:
        if self.lines is not None:
            self.lines.close()
            self.lines = None


def read_metrics(path: Path) -> dict[str, dict[int, float]]:
    """Return values by metric and batch, such as {"loss/train/total": {0: 8.3, 1: 8.1}}.

    Of two values for a batch the later one counts. An unfinished last line is skipped.
    """
    metrics: dict[str, dict[int, float]] = {}
    for _, values in read_lines(path, growing=True):
        batch = values.pop("batch")
        for name, value in values.items():
            metrics.setdefault(name, {})[batch] = value
    return metrics
