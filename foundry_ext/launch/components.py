"""The components that a YAML names, and what is said when one of them cannot be built.

llm-foundry builds them one after another from its registries. Names and keys are compared with the
registries before the first one is built, so that a misspelt key of the optimizer does not wait for
the data and the model. What a component finds wrong with its values itself is told with the
section of the YAML it stands in.
"""

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foundry_ext.utils.errors import UserError, one_line, suggest


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
_TOKENIZER = (
    "tokenizer.name must be a local folder with tokenizer.json and tokenizer_config.json, or a name"
    " on the hub where that can be reached"
)


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
                _check_keys(place, settings, section, _registered(place, name, section))


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


def _registered(place: str, name: str, section: Section) -> Callable[..., Any]:
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


@contextlib.contextmanager
def errors_name_their_section() -> Iterator[None]:
    """Make errors of llm-foundry's builders say which section of the YAML they are about.

    An error becomes a UserError where the values of the YAML are its likely reason: UserError and
    OSError of any component, and whatever a component of a library raises. Everything else that
    our own components raise is a fault of ours, and passes with its traceback.
    """
    module: Any = importlib.import_module("llmfoundry.command_utils.train")
    builders = {section.builder: key for key, section in SECTIONS.items()}
    before = {builder: getattr(module, builder) for builder in builders}
    for builder, key in builders.items():
        setattr(module, builder, _naming(key, before[builder]))
    try:
        yield
    finally:
        for builder, build in before.items():
            setattr(module, builder, build)


def _naming(key: str, build: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(build)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        name = _name(inspect.signature(build).bind(*args, **kwargs).arguments)
        try:
            return build(*args, **kwargs)
        except Exception as error:
            if not isinstance(error, UserError | OSError) and _is_ours(key, name):
                raise
            where = f"{key} ({name})" if name else key
            raise UserError(f"{where}: {_describe(key, name, error)}") from error

    return wrapper


def _name(arguments: Mapping[str, Any]) -> str:
    """Return the name of the component that a builder was called for, or "" if it has several."""
    config = arguments.get("cfg") or arguments.get("eval_loader_config")
    inside = config.get("name") if isinstance(config, Mapping) else None
    return str(arguments.get("name") or arguments.get("tokenizer_name") or inside or "")


def _is_ours(key: str, name: str) -> bool:
    if not SECTIONS[key].registries:
        return False
    component = _registered(key, name, SECTIONS[key]) if name else None
    return component is None or getattr(component, "__module__", "").startswith("foundry_ext.")


def _describe(key: str, name: str, error: Exception) -> str:
    text = one_line(error).removesuffix(".")
    if key == "tokenizer":
        from huggingface_hub.errors import HFValidationError

        if isinstance(error, OSError | HFValidationError) and not Path(name).is_dir():
            text = f"no folder here, and the hub does not give it: {text}"
        text = f"{text}; {_TOKENIZER}"
    return text if isinstance(error, UserError) else f"{text} [{type(error).__name__}]"
