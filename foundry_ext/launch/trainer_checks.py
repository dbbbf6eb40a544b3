"""Checks of a run made around Composer's Trainer, whatever callbacks the YAML has.

Data and components are checked before the Trainer is built, weights after it has loaded a
checkpoint and after the last step.
"""

import contextlib
import functools
import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from foundry_ext.config.values import evaluates
from foundry_ext.utils.errors import UserError


@contextlib.contextmanager
def trainer_is_checked(config: Mapping[str, Any], automatic: Sequence[str] = ()) -> Iterator[None]:
    """Make llm-foundry's train command check what it gives to the Trainer, and the weights in it.

    Args:
        config: the run's resolved configuration.
        automatic: keys of it that train.py decided, which the model is told.
    """
    module: Any = importlib.import_module("llmfoundry.command_utils.train")
    build = module.Trainer

    @functools.wraps(build)
    def checked(**arguments: Any) -> Any:
        _check_data(config, arguments)
        arguments["model"].automatic = tuple(automatic)
        trainer = build(**arguments)
        _check_first_weights(config, trainer.state)
        return trainer

    module.Trainer = checked
    try:
        yield
    finally:
        module.Trainer = build


def _check_data(config: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    from foundry_ext.data.dataset import PackedDataset
    from foundry_ext.training.data_checks import check_data

    loader = arguments["train_dataloader"]
    dataset = getattr(getattr(loader, "dataloader", loader), "dataset", None)
    if isinstance(dataset, PackedDataset):
        model = getattr(arguments["model"], "model", None)
        check_data(
            dataset,
            arguments["eval_dataloader"] or (),
            getattr(model, "config", None),
            evaluates=evaluates(config),
        )


def _check_first_weights(config: Mapping[str, Any], state: Any) -> None:
    """Refuse to train weights that are not finite; those of the base model are known to be."""
    from foundry_ext.training.weight_checks import describe_corrupted_weights

    corrupted = describe_corrupted_weights(state)
    if not corrupted:
        return
    model = config.get("model") or {}
    sources = {
        "load_path": config.get("load_path"),
        "save_folder": config.get("save_folder") if state.timestamp.batch > 0 else None,
        "model.pretrained_lora_id_or_path": model.get("pretrained_lora_id_or_path"),
    }
    key = next((key for key, value in sources.items() if value), "model")
    raise UserError(
        f"{key}, {sources.get(key, model.get('name'))!r}: {corrupted} of the weights to train are"
        " not finite; start from others"
    )
