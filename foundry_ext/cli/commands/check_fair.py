"""`foundry-ext check-fair FILE...`: names differences between runs besides their method."""

import argparse
import shlex
from collections.abc import Sequence

from foundry_ext.cli.yaml_arguments import add_yaml_arguments
from foundry_ext.utils.errors import UserError

_MOST_KEYS = 8  # in the command that accepts all differences


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_yaml_arguments(parser, "YAML files of the runs; overrides apply to every file")
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="KEY",
        help="a dotted key that may differ, and all keys below it; repeatable",
    )


def run(arguments: argparse.Namespace) -> int:
    from omegaconf import OmegaConf

    from foundry_ext.comparison.fairness import by_design, differences
    from foundry_ext.config.loading import load_config, split_arguments

    files, overrides = split_arguments(arguments.arguments)
    if len(set(files)) < 2:
        raise UserError(f"{files[0]}: one file; check-fair compares two or more")
    names_differ = len({path.name for path in files}) == len(files)
    configs = {}
    for path in files:
        config = OmegaConf.to_container(load_config(path, overrides), resolve=True)
        assert isinstance(config, dict)
        configs[path.name if names_differ else str(path)] = config
    found = differences(configs, allow=arguments.allow)
    if not found:
        allowed = f"; allowed to differ: {', '.join(arguments.allow)}" if arguments.allow else ""
        print(
            f"{len(configs)} runs are equal in data, batches, schedule, evaluation and all else"
            f"{allowed}; they differ by design in method, learning rate and effective scale: "
            f"{by_design(configs)}"
        )
        return 0
    print(f"{len(configs)} runs differ in more than method and learning rate:")
    for difference in found:
        print(f"  {difference}")
    print("make these equal in every file, or accept them, here and in `foundry-ext compare`:")
    print(f"  {_allowing(arguments, [difference.key for difference in found])}")
    return 1


def _allowing(arguments: argparse.Namespace, keys: Sequence[str]) -> str:
    """Return the command that accepts these keys, and what it has accepted already."""
    keys = [*arguments.allow, *keys] if len(keys) <= _MOST_KEYS else [*arguments.allow, "KEY"]
    allowed = [word for key in keys for word in ("--allow", key)]
    return shlex.join(["foundry-ext", "check-fair", *arguments.arguments, *allowed])
