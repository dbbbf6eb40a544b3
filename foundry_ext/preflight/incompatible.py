"""Components that fail, or compute something else, on packed batches or beside other settings.

Each was run on packed batches of a tiny model: those listed ended in a traceback after training had
begun, all other callbacks and algorithms of llm-foundry's and Composer's work or do nothing.
"""

import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

from foundry_ext.utils.errors import UserError
from foundry_ext.utils.nested import get

_LEAVE_OUT = "leave it out"
_PADDED = "reads padded batches of constant size; " + _LEAVE_OUT
_IMAGES = "changes batches of images; " + _LEAVE_OUT
# Classes, because code_paths may register them under any name.
_NOT_PACKED = {
    "EvalOutputLogging": "needs logits, which packs do not give; use text_samples",
    "LossPerpVsContextLengthLogger": "needs logits, which training does not compute; " + _LEAVE_OUT,
    "CurriculumLearning": "needs a StreamingDataset; list sources with a share in `datasets`",
    "LabelSmoothing": "needs logits, which training does not compute; " + _LEAVE_OUT,
    "SeqLengthWarmup": "cuts padded batches; to start with short documents, train on them first",
    "GatedLinearUnits": "is for BERT, and the model has gated units already; " + _LEAVE_OUT,
    "NoOpModel": "replaces the model; " + _LEAVE_OUT,
    "SelectiveBackprop": _PADDED,
    **dict.fromkeys(("MixUp", "CutMix", "CutOut", "AugMix", "ColOut", "RandAugment"), _IMAGES),
    "ProgressiveResizing": _IMAGES,
}


def check_on_packs(place: str, component: Callable[..., Any], config: Mapping[str, Any]) -> None:
    """Refuse a component that cannot work with the run's packed loader.

    Args:
        place: the component's key in the YAML.
        component: its class or function.
        config: the resolved configuration.

    Raises:
        UserError: it cannot; names the reason and the way out.
    """
    loader = str(get(config, "train_loader.name"))
    if not loader.startswith("packed_"):
        return
    classes = inspect.getmro(component) if inspect.isclass(component) else ()
    for base in classes:
        is_theirs = base.__module__.startswith(("composer.", "llmfoundry."))
        if is_theirs and base.__name__ in _NOT_PACKED:
            raise UserError(f"{place}: with {loader}, it {_NOT_PACKED[base.__name__]}")
    if place == "model" and component.__module__.startswith("llmfoundry."):
        raise UserError(
            f"model.name, {get(config, 'model.name')!r}, would let the documents of a pack see one"
            f" another (train_loader.name: {loader}); set it to smollm2_packed, or use the loader"
            " finetuning or text"
        )


def check_loggers(config: Mapping[str, Any]) -> None:
    """Refuse Composer's W&B logger where it would end an offline run before its first step.

    `autoresume` asks every logger for a checkpoint, and this one then asks W&B's server.

    Raises:
        UserError: the run is offline and looks for checkpoints.
    """
    loggers = config.get("loggers") or {}
    if "wandb" not in loggers or not (config.get("autoresume") and config.get("save_folder")):
        return
    settings = get(loggers, "wandb.init_kwargs") or {}
    mode = settings.get("mode") or os.environ.get("WANDB_MODE", "online")
    if mode in ("offline", "dryrun", "disabled"):
        raise UserError(
            f"loggers.wandb: offline ({mode}) it cannot be asked for checkpoints, which autoresume:"
            " true does; write wandb_metrics in its place, which takes the same keys"
        )
