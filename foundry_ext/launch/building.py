"""Errors of llm-foundry's builders that name the section of the YAML they are about."""

import contextlib
import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from foundry_ext.preflight.components import (
    MANY,
    SECTIONS,
    Section,
    registered,
    without_remote_code,
)
from foundry_ext.utils.errors import UserError, naming, one_line

_TOKENIZER = (
    "tokenizer.name must be a local folder with tokenizer.json and tokenizer_config.json, or a name"
    " on the hub where that can be reached"
)


_MISSING = re.compile(r"^\S+\(\) missing \d+ required [\w -]*arguments?: '(\w+)'")

# Functions of llm-foundry's that check the rest of the YAML: batch sizes by ranks, what goes with
# what, durations and the scheduler's units. All of them run before the first step.
CHECKS = ("make_dataclass_and_log_config", "validate_config", "process_init_device", "Trainer")


# Sections whose files may bring code, and the builder's argument with the YAML's settings.
_WITH_CODE = {"tokenizer": "tokenizer_kwargs", "model": "cfg"}


@contextlib.contextmanager
def no_questions() -> Iterator[None]:
    """Make transformers and datasets refuse remote code that was not asked for in the YAML.

    Components of llm-foundry's and of the user's load data and models without a word about it.
    The libraries would then ask at the terminal, and datasets would obey an environment variable.
    """
    datasets: Any = importlib.import_module("datasets.config")
    dynamic: Any = importlib.import_module("transformers.dynamic_module_utils")
    before = datasets.HF_DATASETS_TRUST_REMOTE_CODE, dynamic.TIME_OUT_REMOTE_CODE
    # A time limit of 0 is their own way to refuse without a question.
    datasets.HF_DATASETS_TRUST_REMOTE_CODE, dynamic.TIME_OUT_REMOTE_CODE = False, 0
    try:
        yield
    finally:
        datasets.HF_DATASETS_TRUST_REMOTE_CODE, dynamic.TIME_OUT_REMOTE_CODE = before


@contextlib.contextmanager
def errors_name_their_section() -> Iterator[None]:
    """Make errors of llm-foundry's builders say which section of the YAML they are about.

    An error becomes a UserError if values of the YAML are its likely cause: UserError and OSError
    of any component, any error of a library's component, and a ValueError of llm-foundry's and
    Composer's own checks. Other errors of our own components are bugs and keep their traceback.
    """
    module: Any = importlib.import_module("llmfoundry.command_utils.train")
    wrappers = {section.builder: _naming(key, section, module) for key, section in SECTIONS.items()}
    wrappers |= {name: _checking(getattr(module, name)) for name in CHECKS}
    wrappers["import_file"] = lambda path: None  # check_components has run the user's code
    before = {name: getattr(module, name) for name in wrappers}
    vars(module).update(wrappers)
    try:
        yield
    finally:
        vars(module).update(before)


def _checking(check: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(check)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with naming("the configuration"):
            return check(*args, **kwargs)

    return wrapper


def _naming(key: str, section: Section, module: Any) -> Callable[..., Any]:
    build = getattr(module, section.builder)

    @functools.wraps(build)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(build).bind(*args, **kwargs)
        name = _name(given.arguments)
        if key in _WITH_CODE:
            settings = given.arguments[_WITH_CODE[key]] or {}
            given.arguments[_WITH_CODE[key]] = without_remote_code(key, name, settings)
        try:
            return build(*given.args, **given.kwargs)
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
    component = registered(key, name, SECTIONS[key]) if name else None
    # The optimizers are constructed by Composer's code, which checks their values.
    constructor = component.__init__ if inspect.isclass(component) else component
    return component is None or getattr(constructor, "__module__", "").startswith("foundry_ext.")


def _describe(key: str, name: str, error: Exception) -> str:
    text = one_line(error).removesuffix(".")
    missing = _MISSING.search(text) if isinstance(error, TypeError) else None
    if missing:  # behind a wrapper that takes any argument, so check_components saw none
        place = f"{key}.{name}" if key in MANY else key
        text = f"missing key, {place}.{missing[1]}; add it ({text})"
    if key == "tokenizer":
        from huggingface_hub.errors import HFValidationError

        if isinstance(error, OSError | HFValidationError) and not Path(name).is_dir():
            text = f"no folder here, and the hub does not give it: {text}"
        text = f"{text}; {_TOKENIZER}"
    return text if isinstance(error, UserError) else f"{text} [{type(error).__name__}]"
