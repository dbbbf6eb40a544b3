"""The defaults of a run's settings, as this version of its components has them.

Checkpoints and records hold them, so that a later version with other defaults still knows what an
absent key meant. They come from signatures. Only the loaders' `dataset` and the sets of
`forgetting`, which are mappings, have them written down here; a test compares these with the code.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields
from typing import Any

from foundry_ext.adapters.targets import LINEARS
from foundry_ext.utils.nested import get

_REGISTRIES = {
    "model": ("models",),
    "optimizer": ("optimizers",),
    "scheduler": ("schedulers",),
    "algorithms": ("algorithms",),
    "callbacks": ("callbacks_with_config", "callbacks"),
    "loader": ("dataloaders",),
}
_PLAIN = (bool, int, float, str, list, tuple, dict, type(None))
DATASETS: dict[str, dict[str, Any]] = {
    name: {
        "eval_packs": None,
        "fixed_shape": False,
        "overlong": overlong,
        "shuffle": False,
        "shuffle_seed": 17,
        **more,
    }
    for name, overlong, more in (
        ("packed_finetuning", "truncate", {"target_prompts": "none", "target_responses": "last"}),
        ("packed_text", "split", {"text_key": "text"}),
    )
}
SETS: dict[str, dict[str, Any]] = {
    "documents": {"kl": False, "max_documents": None},
    "multiple_choice": {
        "max_items": None,
        "metric": "acc_norm",
        "num_fewshot": 0,
        "logprob": False,
    },
    "generation": {"max_items": None, "max_new_tokens": 256, "num_fewshot": 5},
}


def setting_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted key -> default of every setting that has one, for a resolved YAML.

    The components are those that the YAML names. Those that are not registered here have no entry.
    """
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in _defaults(config)
        if isinstance(value, _PLAIN)
    }


def _defaults(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    import omegaconf
    from llmfoundry.utils.config_utils import TrainConfig  # imports a trainer

    for field in fields(TrainConfig):
        if field.default not in (MISSING, omegaconf.MISSING):
            yield field.name, field.default
    for section in ("model", "optimizer", "scheduler"):
        yield from _of_component(section, section, get(config, f"{section}.name"))
    if get(config, "model.peft_config"):
        yield from _of_adapter()
    for section in ("algorithms", "callbacks"):
        for name in config.get(section) or ():
            yield from _of_component(f"{section}.{name}", section, name)
    yield from _of_loader("train_loader", config.get("train_loader"))
    loaders = config.get("eval_loader") or config.get("eval_loaders")
    for loader in loaders if isinstance(loaders, list) else [loaders]:
        label = f"[{get(loader, 'label')}]" if isinstance(loaders, list) else ""
        yield from _of_loader(f"eval_loader{label}", loader)
    for name, content in (get(config, "callbacks.forgetting.sets") or {}).items():
        place = f"callbacks.forgetting.sets.{name}"
        for key, value in SETS.get(str(get(content, "type")), {}).items():
            yield f"{place}.{key}", value
        yield from _of_loader(f"{place}.loader", get(content, "loader"))


def _of_component(place: str, section: str, name: Any) -> Iterator[tuple[str, Any]]:
    import llmfoundry.registry

    for attribute in _REGISTRIES[section]:
        registry = getattr(llmfoundry.registry, attribute)
        if name in registry:
            return _of_signature(place, registry.get(name))
    return iter(())


def _of_signature(place: str, component: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    for parameter in inspect.signature(component).parameters.values():
        if parameter.default is not parameter.empty:
            yield f"{place}.{parameter.name}", parameter.default


def _of_adapter() -> Iterator[tuple[str, Any]]:
    from peft import LoraConfig

    yield from _of_signature("model.peft_config", LoraConfig)
    yield "model.peft_config.target_modules", list(LINEARS)


def _of_loader(place: str, loader: Any) -> Iterator[tuple[str, Any]]:
    name = get(loader, "name")
    yield from _of_component(place, "loader", name)
    dataset = get(loader, "dataset")
    if isinstance(dataset, Mapping) and name in DATASETS:
        for key, value in DATASETS[name].items():
            yield f"{place}.dataset.{key}", value
        yield f"{place}.dataset.pack_tokens", dataset.get("max_seq_len")
