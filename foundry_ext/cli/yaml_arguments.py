"""The arguments `FILE.yaml | key=value` that several commands take."""

import argparse
from pathlib import Path

from foundry_ext.utils.errors import UserError


def add_yaml_arguments(parser: argparse.ArgumentParser, explanation: str) -> None:
    parser.add_argument("arguments", nargs="+", metavar="FILE.yaml | key=value", help=explanation)


def split_one(arguments: argparse.Namespace) -> tuple[Path, list[str]]:
    """Return the YAML file and the overrides.

    Raises:
        UserError: there is not exactly one file.
    """
    from foundry_ext.config.loading import split_arguments

    files, overrides = split_arguments(arguments.arguments)
    if len(files) > 1:
        raise UserError(f"{files[1]}: a second file; this command takes one")
    return files[0], overrides
