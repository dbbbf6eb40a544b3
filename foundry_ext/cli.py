"""The command `foundry-ext`. Each subcommand imports what it needs when it runs."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from foundry_ext import __version__


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (FileNotFoundError, ValueError) as error:
        print(f"foundry-ext: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="foundry-ext", description=__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subcommands = parser.add_subparsers(metavar="COMMAND", required=True)

    export = subcommands.add_parser(
        "export", help="write a Composer checkpoint as a Hugging Face model or peft adapter"
    )
    export.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a Composer .pt file")
    export.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    export.set_defaults(run=run_export)
    return parser


def run_export(arguments: argparse.Namespace) -> None:
    from foundry_ext.adapters import describe_export, export_checkpoint

    print(describe_export(export_checkpoint(arguments.checkpoint, arguments.out)))


if __name__ == "__main__":
    sys.exit(main())
