"""At the end of training: the model as a Hugging Face folder, ready to be loaded or uploaded."""

import logging
import shutil
from pathlib import Path

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from foundry_ext.models.composer_smollm2 import ComposerSmolLM2

log = logging.getLogger(__name__)


class HFExport(Callback):
    """Writes `folder` once training is over: the whole model in fp32, or the adapter alone.

    Args:
        folder: where to; `{run_name}` is replaced. Overwritten only if an export of this callback.
    """

    def __init__(self, folder: str):
        self.folder = folder

    def fit_end(self, state: State, logger: Logger) -> None:
        folder = Path(self.folder.format(run_name=state.run_name))
        model = state.model.module if state.is_model_ddp else state.model
        assert isinstance(model, ComposerSmolLM2), type(model)
        # A collective under FSDP, so on every rank; rank 0 keeps the result.
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(model.model, options=options)
        if dist.get_global_rank() == 0:
            partial = folder.with_name(folder.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            model.model.save_pretrained(partial, state_dict=weights)
            if model.tokenizer is not None:
                model.tokenizer.save_pretrained(partial)
            if folder.exists():
                shutil.rmtree(folder)
            partial.rename(folder)
            log.info("exported to %s", folder)
        dist.barrier()
