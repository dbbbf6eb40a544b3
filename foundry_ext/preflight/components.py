"""Names and keys of the components that a YAML names, compared with llm-foundry's registries.

llm-foundry builds the components one after another. Checking all of them first means that a
misspelt key of the optimizer does not wait for the data and the model.
"""

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from foundry_ext.preflight.incompatible import check_loggers, check_on_packs
from foundry_ext.utils.errors import UserError, one_line, suggest
from foundry_ext.utils.remote_code import KEY, code_only_if_trusted


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
# Annotations that a YAML's value is compared with, and what a person calls them.
_PLAIN: dict[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    type(None): "null",
}
_REPLACED: dict[str, str] = {
    "use_flash_attention_2": "attention_backend",
    "attn_implementation": "attention_backend",
}
MANY = ("loggers", "callbacks", "algorithms")  # {name: settings}; the others say `name` inside


def check_components(config: Mapping[str, Any]) -> None:
    """Compare the names and keys of every component with llm-foundry's registries.

    Args:
        config: the YAML's content, resolved.

    The files of `code_paths` are run first, because they may register components.

    Raises:
        UserError: a component without a name, a name that is not registered, a key that the
            component does not take, or one that is missing; names the nearest known one. Or a
            component that cannot work in this run.
    """
    for path in config.get("code_paths") or ():
        _run(str(path))
    for key, section in SECTIONS.items():
        if section.registries:
            for place, name, settings in _components(key, config.get(key)):
                component = registered(place, name, section)
                _check_keys(place, settings, section, component)
                check_on_packs(place, component, config)
    check_loggers(config)


def _run(path: str) -> None:
    from llmfoundry.utils.registry_utils import import_file

    try:
        import_file(path)
    except (OSError, RuntimeError) as error:  # it wraps what the file raises
        reason = one_line(error.__cause__ or error)
        raise UserError(f"code_paths, {path!r}: {reason}; correct the file or its path") from error


def _components(key: str, content: Any) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield (place in the YAML, name, settings) of each component of a section."""
    if key in MANY:
        for name, settings in _mapping(key, content or {}).items():
            yield f"{key}.{name}", str(name), _mapping(f"{key}.{name}", settings or {})
        return
    for index, settings in enumerate(content if isinstance(content, list) else [content]):
        if not settings:
            continue
        place, needed = key, ["name"]
        if isinstance(content, list):
            place, needed = f"{key}[{index}]", ["label", "name"]
        for missing in [name for name in needed if name not in _mapping(place, settings)]:
            raise UserError(f"{place}: missing key, {missing!r}; add it")
        others = {name: value for name, value in settings.items() if name != "name"}
        yield place, str(settings["name"]), others


def _mapping(place: str, content: Any) -> Mapping[str, Any]:
    if not isinstance(content, Mapping):
        raise UserError(f"{place}: {content!r}; must be a mapping of key: value")
    return content


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
        f"{where}: unknown name, {name!r}{suggest(name, known) or ';'} known: {', '.join(known)};"
        " `code_paths: [file.py]` names a file that registers one of your own"
    )


def without_remote_code(key: str, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with which a tokenizer or model runs no code of its folder.

    llm-foundry's own defaults ask at the terminal for a tokenizer, and run the code for a model.
    `trust_remote_code: true` in the YAML is obeyed.

    Args:
        key: "tokenizer" or "model".
        name: the tokenizer's name or folder, or the model's registered name.
        settings: what the YAML says.
    """
    import llmfoundry.registry

    registry = getattr(llmfoundry.registry, f"{key}s")
    # A tokenizer that is not registered is loaded by transformers' AutoTokenizer.
    takes_it = key == "tokenizer" if name not in registry else _takes(registry.get(name), KEY)
    return code_only_if_trusted(settings) if takes_it else dict(settings)


def _takes(component: Callable[..., Any], key: str) -> bool:
    return key in inspect.signature(component).parameters


def _check_keys(
    place: str, settings: Mapping[str, Any], section: Section, component: Callable[..., Any]
) -> None:
    parameters = inspect.signature(component).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        known = (set(parameters) | section.taken) - section.supplied
        for key in map(str, settings):
            if key not in known:
                hint = _replaced(key, known) or suggest(key, sorted(known))
                hint = hint or "; remove or correct it"
                raise UserError(f"{place}: unknown key, {place}.{key}{hint}")
    for key, parameter in parameters.items():
        variadic = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        needed = parameter.default is parameter.empty and not variadic
        if needed and key not in settings and key not in section.supplied:
            raise UserError(f"{place}: missing key, {place}.{key}; add it")
    if getattr(component, "__module__", "").startswith("foundry_ext."):
        _check_types(place, settings, component)


def _replaced(key: str, known: Collection[str]) -> str:
    """Return the way out for a key of `hf_causal_lm` that another one replaces here, or ""."""
    by = _REPLACED.get(key)
    return f"; remove it, {by} replaces it" if by in known else ""


def _check_types(place: str, settings: Mapping[str, Any], component: Callable[..., Any]) -> None:
    """Compare plain values with the annotations of one of our components."""
    function = component.__init__ if inspect.isclass(component) else component
    for key, hint in get_type_hints(function).items():
        kinds = set(get_args(hint)) if get_origin(hint) in (Union, UnionType) else {hint}
        value = settings.get(key)
        # Classes decide what else they take, and say so better.
        if key not in settings or not kinds <= _PLAIN.keys() or type(value) in kinds:
            continue
        if not (type(value) is int and float in kinds):
            wanted = " or ".join(_PLAIN[kind] for kind in _PLAIN if kind in kinds)
            raise UserError(f"{place}.{key}: {value!r}; must be {wanted}")
