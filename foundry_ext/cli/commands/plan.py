"""`foundry-ext plan YAML [key=value ...]`: estimates of a run: steps, memory, time."""

import argparse
import re

from foundry_ext.cli.yaml_arguments import add_yaml_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_yaml_arguments(
        parser, "YAML files of runs, each planned separately; overrides apply to every file"
    )
    parser.add_argument(
        "--memory",
        type=card_memory,
        action="append",
        default=[],
        metavar="24GB",
        help="memory of a device that the plan does not list; repeatable",
    )
    parser.add_argument(
        "--ranks",
        type=int,
        default=1,
        metavar="N",
        help="processes, one device each, that will train the run (default: %(default)s)",
    )


def card_memory(text: str) -> tuple[str, float]:
    """Parse `24GB` into ("24 GB", bytes); a GB of a card is 2**30 bytes."""
    match = re.fullmatch(r"([0-9.]+) *(?:GB|GiB)?", text, re.IGNORECASE)
    if match is None or not float(match[1]) > 0:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number of gigabytes, such as 24GB")
    return f"{match[1]} GB", float(match[1]) * 2**30


def run(arguments: argparse.Namespace) -> int:
    from foundry_ext.config.loading import load_config, split_arguments
    from foundry_ext.preflight.runs import plan_run

    files, overrides = split_arguments(arguments.arguments)
    for path in files:  # a mistake in the last file is found before the first one is planned
        load_config(path, overrides)
    for index, path in enumerate(files):
        plan = plan_run(path, overrides, num_ranks=arguments.ranks)
        from foundry_ext.preflight.plan.text import format_plan  # slow, so after the check

        print("\n" * bool(index) + format_plan(plan, memory=dict(arguments.memory)))
    return 0
