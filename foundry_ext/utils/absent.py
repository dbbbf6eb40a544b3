"""Settings that a YAML's tables set to null because they do not apply, as if they were not there.

One YAML serves several data sets through tables, `hf_kwargs: {name: ${...}}`, so a key that a data
set has no use for is null. What is left out here is what a YAML for that data set alone would not
have named. The loaders and callbacks leave it out themselves, so that `llmfoundry train` and
`train.py` run the same.
"""

from collections.abc import Mapping
from typing import Any

from foundry_ext.utils.nested import get


def without_nulls(node: Any) -> Any:
    """Return a copy without keys that are null, and without mappings that nothing is left of.

    >>> without_nulls({"hf_kwargs": {"name": None}, "split": "train", "guard": {}})
    {'split': 'train', 'guard': {}}
    """
    if isinstance(node, list):
        return [without_nulls(child) for child in node]
    if not isinstance(node, Mapping):
        return node
    kept = {key: without_nulls(child) for key, child in node.items() if child is not None}
    return {key: child for key, child in kept.items() if child != {} or node[key] == {}}


def dataset_settings(dataset: Mapping[str, Any]) -> dict[str, Any]:
    """Return a loader's `dataset` without nulls, and without a holdout that is all null."""
    kept = without_nulls(dataset)
    holdout = dataset.get("holdout")
    if isinstance(holdout, Mapping) and holdout.get("by", "") is holdout.get("fraction") is None:
        del kept["holdout"]
    return kept


def present_sets(sets: Mapping[str, Any]) -> dict[str, Any]:
    """Return the evaluation sets that have something to read.

    A set is left out if it is null, as `sets.hellaswag=null` makes it, or if its `path` is, or the
    rows of its loader.
    """
    return {name: _set(given) for name, given in sets.items() if _reads(given)}


def _reads(given: Any) -> bool:
    if not isinstance(given, Mapping):
        return given is not None
    dataset = _dataset(given.get("loader"))
    has_name = dataset.get("hf_name", "") is not None
    return given.get("path", "") is not None and (has_name or dataset.get("datasets") is not None)


def _set(given: Any) -> Any:
    has_loader = isinstance(given, Mapping) and "loader" in given
    return {**given, "loader": _loader(given["loader"])} if has_loader else given


def _dataset(loader: Any) -> Mapping[str, Any]:
    dataset = get(loader, "dataset")
    return dataset if isinstance(dataset, Mapping) else {}


def _loader(loader: Any) -> Any:
    dataset = _dataset(loader)
    return {**loader, "dataset": dataset_settings(dataset)} if dataset else loader


def run_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a resolved configuration without what does not apply; `variables` stay as they are."""
    kept = dict(config)
    if isinstance(config.get("model"), Mapping):
        kept["model"] = {key: value for key, value in config["model"].items() if value is not None}
    for key in ("train_loader", "eval_loader"):
        if isinstance(config.get(key), list):
            kept[key] = [_loader(loader) for loader in config[key]]
        elif key in config:
            kept[key] = _loader(config[key])
    sets = get(config, "callbacks.forgetting.sets")
    if isinstance(sets, Mapping):
        callbacks = config["callbacks"]
        forgetting = {**callbacks["forgetting"], "sets": present_sets(sets)}
        kept["callbacks"] = {**callbacks, "forgetting": forgetting}
    return kept
