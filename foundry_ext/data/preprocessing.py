"""Preprocessing functions: what their source depends on, and what they must not do with a null."""

import ast
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import PathFinder
from importlib.util import resolve_name
from pathlib import Path
from typing import Any

from foundry_ext.data import prompts
from foundry_ext.utils.errors import UserError

_INSTALLED = ("site-packages", "dist-packages")


def format_row(preprocess: Callable[[dict[str, Any]], Any], row: dict[str, Any]) -> Any:
    """Return preprocess(row).

    Raises:
        UserError: the function wrote a null of the row as the text "None".
    """
    nulls = [name for name, value in row.items() if value is None]
    if not nulls:
        return preprocess(row)
    original = dict(row)  # the function may change its row
    formatted = preprocess(row)
    if _count_none(formatted) and _count_none(formatted) > _without_nulls(preprocess, original):
        raise UserError(
            f"preprocessing_fn writes null as the text 'None'; {' and '.join(map(repr, nulls))} is"
            " null, or missing: correct or remove the row, or let the function handle it"
        )
    return formatted


def _count_none(formatted: Any) -> int:
    if isinstance(formatted, str):
        return formatted.count("None")
    if isinstance(formatted, dict):
        return sum(map(_count_none, formatted.values()))
    return sum(map(_count_none, formatted)) if isinstance(formatted, list | tuple) else 0


def _without_nulls(preprocess: Callable[[dict[str, Any]], Any], row: dict[str, Any]) -> float:
    """Return how many "None" the function writes if each null is an empty text."""
    try:
        return _count_none(
            preprocess({name: "" if value is None else value for name, value in row.items()})
        )
    except Exception:  # it handles nulls, and not empty texts
        return float("inf")


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
