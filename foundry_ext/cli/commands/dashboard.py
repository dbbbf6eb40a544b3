"""`foundry-ext dashboard ENTITY/PROJECT`: makes a dashboard of the project's runs in W&B."""

import argparse
import json
import re

from foundry_ext.utils.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("project", metavar="ENTITY/PROJECT", help="W&B's user or team, and the project")
    add("--name", default="foundry_ext", help="the dashboard's name (default: foundry_ext)")
    for role, example in (("learning", "target_loss"), ("forgetting", "source_kl")):
        add(
            f"--{role}",
            nargs="+",
            action="extend",
            metavar="KEY",
            help=f"metrics of {role} to plot, e.g. {example} (default: those of the shipped YAMLs)",
        )
    add(
        "--dry-run",
        action="store_true",
        help="print the dashboard's specification as JSON; needs neither W&B nor the network",
    )


def run(arguments: argparse.Namespace) -> int:
    from foundry_ext.comparison.dashboard import FORGETTING, LEARNING, dashboard, save

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", arguments.project):
        raise UserError(f"{arguments.project}: must be ENTITY/PROJECT, as in the project's address")
    entity, project = arguments.project.split("/")
    specification = dashboard(
        entity,
        project,
        name=arguments.name,
        learning=arguments.learning or LEARNING,
        forgetting=arguments.forgetting or FORGETTING,
    )
    if arguments.dry_run:
        print(json.dumps(specification, indent=1, ensure_ascii=False))
    else:
        print(f"made: {save(specification)}")
    return 0
