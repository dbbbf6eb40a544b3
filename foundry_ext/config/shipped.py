"""The YAMLs that come with the package."""

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


def shipped_yamls() -> Path:
    """Return the folder of the shipped YAMLs: part of the package in a wheel, yamls/ in a clone."""
    installed = _PACKAGE / "yamls"
    return installed if installed.is_dir() else _PACKAGE.parent / "yamls"
