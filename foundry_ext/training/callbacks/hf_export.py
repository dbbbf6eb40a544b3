"""`hf_export`: writes the trained model as a Hugging Face folder, ready to load or upload."""

import logging
from pathlib import Path

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from foundry_ext.checkpoints.export import write_folder
from foundry_ext.training.meter import unwrapped
from foundry_ext.training.model import ComposerSmolLM2
from foundry_ext.training.weight_checks import check_final_weights
from foundry_ext.utils.atomic import replaced_folder
from foundry_ext.utils.errors import UserError

log = logging.getLogger(__name__)

_MARK = ".hf_export"  # marks folders of this callback, which it may overwrite


class HFExport(Callback):
    """Callback that writes the full model in fp32, or the adapter only, at the end of training.

    Args:
        folder: where to write; `{run_name}` is replaced. Only an earlier export is overwritten.
    """

    def __init__(self, folder: str):
        self.folder = folder

    def fit_start(self, state: State, logger: Logger) -> None:
        """Refuse a folder that is in use, before the training instead of after it.

        Raises:
            UserError: the folder holds files that this callback did not write.
        """
        folder = self._folder(state)
        if dist.get_global_rank() != 0 or not folder.exists():
            return
        if not folder.is_dir() or (any(folder.iterdir()) and not (folder / _MARK).exists()):
            raise UserError(
                f"hf_export.folder: {folder} exists and is not an earlier export; name another"
                " folder or remove it"
            )

    def fit_end(self, state: State, logger: Logger) -> None:
        """Export the model. A collective.

        Raises:
            FloatingPointError: its weights are not finite.
        """
        check_final_weights(state)
        folder = self._folder(state)
        model = unwrapped(state)
        assert isinstance(model, ComposerSmolLM2), type(model)
        # On every rank because it is a collective under FSDP; rank 0 gets the result.
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(model.model, options=options)
        if model.config.tie_word_embeddings:
            weights.pop("lm_head.weight", None)  # once gathered from shards, it is a second copy
        if dist.get_global_rank() == 0:
            with replaced_folder(folder) as partial:
                write_folder(model.model, model.tokenizer, partial, weights)
                (partial / _MARK).touch()
            log.info("exported to %s", folder)
        dist.barrier()

    def _folder(self, state: State) -> Path:
        return Path(self.folder.format(run_name=state.run_name))
