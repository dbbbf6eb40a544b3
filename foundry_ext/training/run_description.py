"""Descriptions of a run's method, data and model for its record, read from Composer's state."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from composer.callbacks import CheckpointSaver
from composer.core import State
from composer.loggers import LoggerDestination
from composer.utils import dist

from foundry_ext.adapters.methods import Method, method_of_config
from foundry_ext.data.dataset import PackedDataset
from foundry_ext.evaluation.measure import EvalSet
from foundry_ext.training.attention_choice import used_backend
from foundry_ext.training.data_checks import evaluated_datasets
from foundry_ext.training.meter import unwrapped
from foundry_ext.utils.environment import describe_environment
from foundry_ext.utils.errors import UserError


def find_callback(state: State, kind: type) -> Any:
    """Return the run's callback of this class, or None."""
    return next((callback for callback in state.callbacks if isinstance(callback, kind)), None)


def method_of(state: State) -> Method:
    """Return the run's method, read from the adapter on its model."""
    adapted = getattr(unwrapped(state), "model", None)
    adapters = getattr(adapted, "peft_config", None)
    return method_of_config(None if adapters is None else next(iter(adapters.values())).to_dict())


def describe_loader(dataset: PackedDataset) -> dict[str, Any]:
    """Return a loader's entry in `data`; a mixture has the names and revisions of its sources."""
    return {
        "name": dataset.describe_sources("name"),
        "revision": dataset.describe_sources("revision"),
        "fingerprint": dataset.documents.fingerprint,  # the same for every seed and rank
        "documents": dataset.num_documents,
        "tokens": dataset.documents.num_tokens,
        "counts": dict(dataset.documents.counts),
    }


def describe_evaluation_data(state: State, sets: Iterable[EvalSet] = ()) -> dict[str, Any]:
    """Return `data.eval`: Composer's evaluators as eval/<label>, and the sets by their names."""
    packed = evaluated_datasets(state.evaluators)
    loaders = {f"eval/{label}": describe_loader(dataset) for label, dataset in packed}
    return loaders | {eval_set.config.name: eval_set.description for eval_set in sets}


def describe_model(config: dict[str, Any], method: Method) -> dict[str, Any]:
    """Return the record's `model`."""
    # llm-foundry logs its counts with the configuration, from before the model is sharded.
    targets, init = method.target_modules, method.init
    if isinstance(init, bool):  # peft's unnamed ones: True sets B to zero, False draws A and B
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


def inside_folder_of(record: Path, items: Path, given: str) -> str:
    """Return the path of the per-item file as its record names it.

    Raises:
        UserError: it does not lie beside the record; names what was `given` in the YAML.
    """
    folder, items = record.absolute().parent, items.absolute()
    if not items.is_relative_to(folder):
        raise UserError(
            f"forgetting.items: {given} does not lie beside the run's record; give a path in"
            f" {record.parent}"
        )
    return items.relative_to(folder).as_posix()


def environment_of(state: State) -> dict[str, Any]:
    """Return the record's `environment`."""
    described = describe_environment(
        device_kind=device_kind(state), world_size=dist.get_world_size()
    )
    return {**described, "attention_backend": used_backend(unwrapped(state))}


def device_kind(state: State) -> str:
    """Return "cuda" or "cpu"."""
    return "cuda" if state.device.name == "gpu" else state.device.name


def newest_checkpoint(state: State) -> str | None:
    """Return, on rank 0, the newest checkpoint that this process has saved or found."""
    savers = [one for one in state.callbacks if isinstance(one, CheckpointSaver)]
    saved = [path for saver in savers for path in saver.saved_checkpoints]
    return str(saved[-1]) if saved else None


class LoggedSettings(LoggerDestination):
    """Logger that keeps llm-foundry's configuration and the metrics of an evaluation."""

    def __init__(self):
        self.config: dict[str, Any] | None = None
        self.metrics: dict[str, float] = {}

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        if "train_loader" in hyperparameters:  # Composer logs others, of versions and devices
            self.config = hyperparameters

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        for name, value in metrics.items():
            group, _, metric = name.partition("/")
            if group == "metrics" and not metric.startswith("train/"):
                self.metrics[metric] = float(value)
