"""`foundry-ext tasks NAME OUT`: writes an evaluation task as JSONL."""

import argparse
from pathlib import Path

from foundry_ext.utils.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("name", metavar="NAME", help="hellaswag, arc_challenge, winogrande or gsm8k")
    add("out", type=Path, metavar="OUT", help="the JSONL file to write")
    add(
        "--source",
        type=Path,
        metavar="FILE",
        help="a JSONL file with the hub's columns, instead of the hub",
    )
    add("--split", help="split to read (default: the one with public labels)")
    add("--revision", help="branch, tag or commit on the hub (default: main)")


def run(arguments: argparse.Namespace) -> int:
    from foundry_ext.evaluation.tasks import source_file, write_task

    if arguments.source is not None and (arguments.split or arguments.revision):
        raise UserError("--split and --revision are the hub's; leave them out with --source")
    count = write_task(
        arguments.name,
        arguments.out,
        source=arguments.source,
        split=arguments.split,
        revision=arguments.revision,
    )
    print(f"{arguments.out}: {count} rows; {source_file(arguments.out)} says where from")
    return 0
