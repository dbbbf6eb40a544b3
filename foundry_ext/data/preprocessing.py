"""Preprocessing functions: what their source depends on, and what they must not do with a null."""

import ast
import copy
import functools
import inspect
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import PathFinder
from importlib.util import resolve_name
from pathlib import Path
from typing import Any, cast

from foundry_ext.data import prompts
from foundry_ext.utils.errors import UserError

_INSTALLED = ("site-packages", "dist-packages")
# Characters for private use, as many as "None" has: a function may cut or fill its texts.
_WRITTEN, _KEPT = "\ue000\ue001\ue002\ue003", "\ue004\ue005\ue006\ue007"


class _Null(str):
    """Stand-in for a null: false like None, and written into a text as `_WRITTEN`.

    A text that it is added to or joined with, where None is an error, holds `_KEPT` instead.
    """

    def __new__(cls) -> "_Null":
        return super().__new__(cls, _KEPT)

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return _WRITTEN

    def __format__(self, spec: str) -> str:
        return format(_WRITTEN, spec)

    __repr__ = __str__  # as None in a list that is written


def format_row(preprocess: Callable[[dict[str, Any]], Any], row: dict[str, Any]) -> Any:
    """Return preprocess(row).

    Raises:
        UserError: the function wrote a null, of the row or inside one of its values, as the text
            "None".
    """
    nulls = list(_nulls(row))
    if not nulls:
        return preprocess(row)
    original = copy.deepcopy(row)  # the function may change its row
    formatted = preprocess(row)
    texts = list(_texts(formatted))
    if any("None" in text for text in texts):
        for path in nulls:
            if _writes(preprocess, original, path, texts):
                raise UserError(
                    f"preprocessing_fn writes null as the text 'None'; {_name(path)!r} is null, or"
                    " missing: correct or remove the row, or let the function handle it"
                )
    return formatted


def _nulls(value: Any) -> Iterator[tuple[Any, ...]]:
    """Yield the keys and positions that lead to each null."""
    if isinstance(value, dict | list):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            if one is None:
                yield (key,)
            elif isinstance(one, dict | list):
                yield from ((key, *path) for path in _nulls(one))


def _texts(formatted: Any) -> Iterator[str]:
    if isinstance(formatted, str):
        yield formatted
    elif isinstance(formatted, dict | list | tuple):
        for one in formatted.values() if isinstance(formatted, dict) else formatted:
            yield from _texts(one)


def _writes(
    preprocess: Callable[[dict[str, Any]], Any],
    row: dict[str, Any],
    path: Sequence[Any],
    texts: list[str],
) -> bool:
    """Return whether the stand-in for this null comes where the function's texts have "None"."""
    row = copy.deepcopy(row)
    functools.reduce(operator.getitem, path[:-1], cast(Any, row))[path[-1]] = _Null()
    try:
        marked = list(_texts(preprocess(row)))
    except Exception:  # it handles nulls, and not every text
        return False
    return any(
        _WRITTEN in new and new.replace(_WRITTEN, "None") == old
        for new, old in zip(marked, texts, strict=False)
    )


def _name(path: Sequence[Any]) -> str:
    """Return qa.answers[1] for ("qa", "answers", 1)."""
    return "".join(f"[{one}]" if isinstance(one, int) else f".{one}" for one in path)[1:]


def module_sources(function: Callable[..., Any] | None) -> dict[str, bytes]:
    """Return the source of the function's module and of the user's modules that it imports.

    Those that these import are included, and so on. Modules of Python and installed packages are
    not, unless the function's own. An import by a computed name, and a file that the code reads,
    cannot be known.
    """
    function = _unwrap(function)
    name = getattr(function, "__module__", None) or ""
    path = _source_file(function)
    if path is None:
        return {}
    sources: dict[str, bytes] = {}
    own = name.partition(".")[0]
    waiting = [(name, path, path.name == "__init__.py")]
    while waiting:
        name, path, is_package = waiting.pop()
        if name in sources:
            continue
        sources[name] = path.read_bytes()
        if path.suffix == ".py":
            package = name if is_package else name.rpartition(".")[0]
            for imported in _imports(sources[name], package):
                waiting += [one for one in _find(imported, own) if one[0] not in sources]
    return sources


def _unwrap(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function) if callable(function) else function
    function = getattr(function, "__func__", function)
    return function if inspect.isroutine(function) or function is None else type(function)


def _source_file(function: Any) -> Path | None:
    try:
        path = inspect.getsourcefile(function)
    except TypeError:  # built in
        return None
    return Path(path) if path and Path(path).is_file() else None


def _imports(source: bytes, package: str) -> Iterator[str]:
    """Yield the names of modules that a source imports anywhere, and of what may be one."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            relative = "." * node.level + (node.module or "")
            try:
                module = resolve_name(relative, package) if node.level else relative
            except ImportError:
                continue
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _find(name: str, own: str) -> Iterator[tuple[str, Path, bool]]:
    """Yield (name, file, whether it is a package) of a user's module and of the packages above it.

    `own` is a package that is the user's wherever it lies. Nothing is imported, because that would
    run code.
    """
    if name.startswith(prompts.__name__):
        yield prompts.__name__, Path(prompts.__file__), False
    parts, search = name.split("."), None
    if parts[0] in ("foundry_ext", *sys.stdlib_module_names):
        return
    for end in range(1, len(parts) + 1):
        part = ".".join(parts[:end])
        try:
            spec = getattr(sys.modules.get(part), "__spec__", None)
            spec = spec or PathFinder.find_spec(part, search)
        except (ImportError, ValueError):
            return
        if spec is None:
            return
        search = spec.submodule_search_locations
        path = Path(spec.origin) if spec.has_location and spec.origin else None
        if path is not None and path.is_file():
            if parts[0] != own and set(path.parts) & set(_INSTALLED):
                return
            yield part, path, search is not None
        if search is None:
            return
