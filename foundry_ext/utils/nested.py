"""Dotted keys of nested mappings, such as a YAML's."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any


def get(node: Any, key: str) -> Any:
    """Return the value at a dotted key, or None if a part of the key is missing.

    >>> get({"optimizer": {"lr": 0.1}}, "optimizer.lr")
    0.1
    """
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def put(node: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Return a copy with the value at a dotted key.

    >>> put({"a": {"b": 1}}, "a.c", 2)
    {'a': {'b': 1, 'c': 2}}
    """
    first, _, rest = key.partition(".")
    below = node.get(first)
    inside = below if isinstance(below, Mapping) else {}
    return {**node, first: put(inside, rest, value) if rest else value}


def leaves(
    node: Any,
    key: str = "",
    *,
    into_lists: bool = False,
    skip: Callable[[str], bool] = lambda name: False,
) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of everything that is not a mapping itself.

    >>> dict(leaves({"a": {"b": 1, "c": [2, 3]}}))
    {'a.b': 1, 'a.c': [2, 3]}

    Args:
        node: a mapping, or any other value, which is its own leaf.
        key: the key of `node`, put before every key below it.
        into_lists: yield a list's elements, as `a.c[0]`, instead of the list.
        skip: a predicate of names; their values, and all keys below them, are left out.
    """
    if isinstance(node, Mapping):
        for name, child in node.items():
            if not skip(str(name)):
                below = f"{key}.{name}" if key else str(name)
                yield from leaves(child, below, into_lists=into_lists, skip=skip)
    elif into_lists and isinstance(node, list | tuple):
        for index, child in enumerate(node):
            yield from leaves(child, f"{key}[{index}]", into_lists=True, skip=skip)
    else:
        yield key, node


def is_below(key: str, above: str) -> bool:
    """Return whether `key` is `above` or lies below it.

    >>> is_below("callbacks.guard", "callbacks"), is_below("callbacks_x", "callbacks")
    (True, False)
    """
    return key == above or key.startswith((f"{above}.", f"{above}[", f"{above} "))
