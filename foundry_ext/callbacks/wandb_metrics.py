"""Weights & Biases for metrics, with checkpoints kept out of it."""

from composer.loggers import WandBLogger


class WandBMetrics(WandBLogger):
    """Composer's WandBLogger, except that it is never asked for checkpoints.

    `autoresume` looks for a run's newest checkpoint on disk and then in every logger. Composer's
    asks the W&B server for an artifact, which offline ends the run with "can only be called after
    running init()" before its first step. Arguments are those of `wandb`.
    """

    def can_upload_files(self) -> bool:
        return False

    def download_file(
        self,
        remote_file_name: str,
        destination: str,
        overwrite: bool = False,
        progress_bar: bool = True,
    ) -> None:
        raise FileNotFoundError(f"{remote_file_name}: checkpoints are on disk, not in W&B")
