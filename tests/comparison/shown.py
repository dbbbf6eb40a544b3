"""Keys of metrics and of the configuration that a dashboard's panels show."""

from collections.abc import Iterator
from typing import Any, NamedTuple


class Shown(NamedTuple):
    """A key that a panel shows; `place` is summary, history or config."""

    place: str
    key: str


def shown(specification: dict[str, Any]) -> set[Shown]:
    """Return what the panels show; keys of history may be regular expressions."""
    return {
        one
        for section in specification["sections"]
        for panel in section["panels"]
        for one in _shown_by(panel)
    }


def _shown_by(panel: dict[str, Any]) -> Iterator[Shown]:
    for argument, value in panel.items():
        if isinstance(value, dict):
            [(place, key)] = value.items()
            yield Shown(place, key)
        elif argument == "x" or argument == "metric_regex":
            yield Shown("history", value)
        elif argument == "y":
            yield from (Shown("history", key) for key in value)
        elif argument == "table_name":
            yield Shown("summary", value)
