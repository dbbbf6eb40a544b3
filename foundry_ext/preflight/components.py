"""Names and keys of the components that a YAML names, compared with llm-foundry's registries.

llm-foundry builds the components one after another. Checking all of them first means that a
misspelt key of the optimizer does not wait for the data and the model.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from foundry_ext.utils.errors import UserError, suggest


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section of the YAML and how llm-foundry builds it."""

    builder: str
    """The function of llmfoundry.command_utils.train."""
    registries: tuple[str, ...] = ()
    """Names in llmfoundry.registry; the first one that has the component's name is taken."""
    taken: frozenset[str] = frozenset()
    """Keys that llm-foundry takes before the component gets the rest."""
    supplied: frozenset[str] = frozenset()
    """Arguments that llm-foundry adds, which are not keys of the YAML."""


_LOADER = Section(
    builder="build_dataloader",
    registries=("dataloaders",),
    supplied=frozenset({"tokenizer", "device_batch_size"}),
)
SECTIONS = {
    "tokenizer": Section(builder="build_tokenizer"),
    "scheduler": Section(builder="build_scheduler", registries=("schedulers",)),
    "loggers": Section(builder="build_logger", registries=("loggers",)),
    "callbacks": Section(
        builder="build_callback",
        registries=("callbacks_with_config", "callbacks"),
        supplied=frozenset({"train_config"}),
    ),
    "algorithms": Section(builder="build_algorithm", registries=("algorithms",)),
    "train_loader": _LOADER,
    "eval_loader": Section(
        builder="build_evaluators",
        registries=_LOADER.registries,
        taken=frozenset({"label"}),
        supplied=_LOADER.supplied,
    ),
    "model": Section(
        builder="build_composer_model",
        registries=("models",),
        taken=frozenset({"init_device", "master_weights_dtype"}),
        supplied=frozenset({"tokenizer"}),
    ),
    "optimizer": Section(
        builder="build_optimizer",
        registries=("optimizers",),
        taken=frozenset({"disable_grad", "param_groups"}),
        supplied=frozenset({"params"}),
    ),
}
_MANY = ("loggers", "callbacks", "algorithms")  # {name: settings}; the others say `name` inside


def check_components(config: Mapping[str, Any]) -> None:
    """Compare the names and keys of every component with llm-foundry's registries.

    Args:
        config: the YAML's content, resolved.

    Raises:
        UserError: a component without a name, a name that is not registered, or a key that the
            component does not take; names the nearest known one.
    """
    for key, section in SECTIONS.items():
        if section.registries:
            for place, name, settings in _components(key, config.get(key)):
                _check_keys(place, settings, section, registered(place, name, section))


def _components(key: str, content: Any) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield (place in the YAML, name, settings) of each component of a section."""
    if key in _MANY:
        for name, settings in (content or {}).items():
            yield f"{key}.{name}", str(name), settings or {}
        return
    for index, settings in enumerate(content if isinstance(content, list) else [content]):
        if not settings:
            continue
        place, needed = key, ["name"]
        if isinstance(content, list):
            place, needed = f"{key}[{index}]", ["label", "name"]
        for missing in [name for name in needed if name not in settings]:
            raise UserError(f"{place}: missing key, {missing!r}; add it")
        others = {name: value for name, value in settings.items() if name != "name"}
        yield place, str(settings["name"]), others


def registered(place: str, name: str, section: Section) -> Callable[..., Any]:
    """Return the class or function registered under `name`.

    Raises:
        UserError: there is none; names `place` and the nearest known name.
    """
    import llmfoundry.registry

    registries = [getattr(llmfoundry.registry, registry) for registry in section.registries]
    for registry in registries:
        if name in registry:
            return registry.get(name)
    known = sorted({known for registry in registries for known in registry.get_all()})
    where = place if place.endswith(f".{name}") else f"{place} ({name})"
    raise UserError(
        f"{where}: unknown name, {name!r}{suggest(name, known) or ';'} known: {', '.join(known)}"
    )


def _check_keys(
    place: str, settings: Mapping[str, Any], section: Section, component: Callable[..., Any]
) -> None:
    parameters = inspect.signature(component).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = ({parameter.name for parameter in parameters} | section.taken) - section.supplied
    for key in map(str, settings):
        if key not in known:
            hint = suggest(key, sorted(known)) or "; remove or correct it"
            raise UserError(f"{place}: unknown key, {place}.{key}{hint}")
