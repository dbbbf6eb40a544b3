"""`metrics_file`: writes every logged number as JSON lines, readable without a server."""

import json
from pathlib import Path
from typing import IO, Any

from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist

from foundry_ext.utils.json_lines import open_lines, read_lines


class MetricsFile(LoggerDestination):
    """Logger that appends lines like {"batch": 20, "token": 81920, "loss/train/total": 3.1}.

    `batch` and `token` (real tokens) are the progress of training. A resumed run continues the
    file: batches after the checkpoint have two lines, of which the later one counts.

    Args:
        path: the file; `{run_name}` is replaced.
    """

    def __init__(self, path: str):
        self.path = path
        self.file: IO[str] | None = None
        self.state: State | None = None

    def after_load(self, state: State, logger: Logger) -> None:
        """Open the file; at `init` a run that is about to be resumed would still look new."""
        self.state = state
        if dist.get_global_rank() == 0:
            path = Path(self.path.format(run_name=state.run_name))
            self.file = open_lines(path, resumed=state.timestamp.batch > 0)

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if self.file is None or self.state is None:
            return
        numbers = {name: float(value) for name, value in metrics.items()}
        clock = self.state.timestamp
        line = {"batch": clock.batch.value, "token": clock.token.value, **numbers}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()  # so that a kill loses no line

    def post_close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


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
