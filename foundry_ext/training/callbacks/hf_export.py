"""At the end of training: the model as a Hugging Face folder, ready to be loaded or uploaded."""

import logging
from pathlib import Path

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from foundry_ext.checkpoints.export import write_folder
from foundry_ext.training.model import ComposerSmolLM2
from foundry_ext.utils.atomic import replaced_folder
from foundry_ext.utils.errors import UserError

log = logging.getLogger(__name__)

_MARK = ".hf_export"  # lies in what this callback wrote, and so may write over


class HFExport(Callback):
    """Writes `folder` once training is over: the whole model in fp32, or the adapter alone.

    Args:
        folder: where to; `{run_name}` is replaced. Overwritten only if an export of this callback.
    """

    def __init__(self, folder: str):
        self.folder = folder

    def fit_start(self, state: State, logger: Logger) -> None:
        """Refuses a folder in use before the training, not after it.

        Raises:
            UserError: there is something in it that this callback did not write.
        """
        folder = self._folder(state)
        if dist.get_global_rank() != 0 or not folder.exists():
            return
        if not folder.is_dir() or (any(folder.iterdir()) and not (folder / _MARK).exists()):
            raise UserError(
                f"hf_export.folder: {folder} exists and is no earlier export; name another folder"
                " or remove it"
            )

    def fit_end(self, state: State, logger: Logger) -> None:
        folder = self._folder(state)
        model = state.model.module if state.is_model_ddp else state.model
        assert isinstance(model, ComposerSmolLM2), type(model)
        # A collective under FSDP, so on every rank; rank 0 keeps the result.
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(model.model, options=options)
        if model.config.tie_word_embeddings:
            weights.pop("lm_head.weight", None)  # gathered from shards, it is a second copy
        if dist.get_global_rank() == 0:
            partial = folder.with_name(f".{folder.name}.partial")  # names that nobody gives
            with replaced_folder(folder, partial=partial):
                write_folder(model.model, model.tokenizer, partial, weights)
                (partial / _MARK).touch()
            log.info("exported to %s", folder)
        dist.barrier()

    def _folder(self, state: State) -> Path:
        return Path(self.folder.format(run_name=state.run_name))
