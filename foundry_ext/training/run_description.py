"""What a run is, read off its state: method, data and model, as they stand in its record."""

from collections.abc import Iterable
from typing import Any

from composer.core import State

from foundry_ext.adapters.methods import Method, method_of_config
from foundry_ext.data.dataset import PackedDataset
from foundry_ext.training.meter import unwrapped
from foundry_ext.utils.errors import UserError


def find(state: State, kind: type) -> Any:
    """The run's callback of this class, or None."""
    return next((callback for callback in state.callbacks if isinstance(callback, kind)), None)


def check_data(state: State, dataset: PackedDataset) -> None:
    """
    Raises:
        UserError: documents may be longer than the model has positions, or an evaluation is of
            the documents that are trained on.
    """
    longest = dataset.collator.max_seq_len
    config = getattr(getattr(unwrapped(state), "model", None), "config", None)
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise UserError(
            f"train_loader.dataset.max_seq_len: {longest} is more than the model's {positions}"
            " positions; lower it, or raise model.config_overrides.max_position_embeddings, whose"
            " positions are then learned anew"
        )
    for evaluator in state.evaluators:
        own = getattr(evaluator.dataloader.dataloader, "dataset", None)
        if not isinstance(own, PackedDataset):
            continue
        if own.documents.fingerprint == dataset.documents.fingerprint:
            raise UserError(
                f"eval_loader {evaluator.label}: these are the very documents of train_loader;"
                " evaluate on held-out ones (`holdout`, or another file)"
            )


def method_of(state: State) -> Method:
    """What the run trains, by the adapter on its model."""
    adapted = getattr(unwrapped(state), "model", None)
    adapters = getattr(adapted, "peft_config", None)
    return method_of_config(None if adapters is None else next(iter(adapters.values())).to_dict())


def describe_loader(dataset: PackedDataset) -> dict[str, Any]:
    """A loader's part of `data`; of a mixture, the names and revisions of its sources."""
    return {
        "name": dataset.describe_sources("name"),
        "revision": dataset.describe_sources("revision"),
        "fingerprint": dataset.documents.fingerprint,  # the same for every seed and rank
        "documents": dataset.num_documents,
        "tokens": int(dataset.documents.lengths.sum()),
        "counts": dict(dataset.documents.counts),
    }


def evaluation_data(state: State, sets: Iterable[Any] = ()) -> dict[str, Any]:
    """Describe Composer's evaluators as eval/<label>, and the `forgetting` callback's sets."""
    found = {}
    for evaluator in state.evaluators:
        dataset = getattr(evaluator.dataloader.dataloader, "dataset", None)
        if isinstance(dataset, PackedDataset):
            found[f"eval/{evaluator.label}"] = describe_loader(dataset)
    return found | {evaluated.settings.name: evaluated.description for evaluated in sets}


def describe_model(state: State, config: dict[str, Any], method: Method) -> dict[str, Any]:
    """The record's `model`.

    Args:
        config: as llm-foundry logs it, with its counts of parameters, made before anything wraps
            or shards the model.
    """
    targets, init = method.target_modules, method.init
    if isinstance(init, bool):  # peft's two unnamed ones: B is zero, or both are random
        init = "default" if init else "random"
    return {
        "name": str(config["model"].get("pretrained_model_name_or_path")),
        "parameters": config["n_params"],
        "trainable_parameters": config["n_trainable_params"],
        "rank": method.rank,
        "alpha": method.alpha,
        "effective_scale": method.effective_scale,
        "target_modules": [targets] if isinstance(targets, str) else targets and list(targets),
        "init": init,
    }


def device_kind(state: State) -> str:
    return "cuda" if state.device.name == "gpu" else state.device.name
