"""The command `foundry-ext`: a table of subcommands, each imported only when it is called."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from textwrap import shorten
from types import ModuleType

from foundry_ext import __version__
from foundry_ext.utils.errors import TRACEBACK_VARIABLE, UserError, one_line, wants_traceback

# name -> what it does; `check-fair` is foundry_ext/cli/commands/check_fair.py
COMMANDS = {
    "config": "print a run's YAML with every variable and choice filled in",
    "inspect": "one HTML page of the first packs, exactly as the model gets them",
    "plan": "what a run would do: steps, tokens, memory, time; nothing is trained",
    "verify": "a few steps: packed is unpacked, resumed is uninterrupted, or where it parts",
    "check-fair": "name every difference between runs that are meant to differ by method alone",
    "sweep": "run a W&B sweep file here, without a server",
    "compare": "learning, forgetting and cost of runs: comparison.md, one HTML page, plots",
    "eval": "learning and forgetting of a checkpoint, a model or an adapter",
    "tasks": "write evaluation tasks as JSONL, from the hub or a local file",
    "analyse": "rank of the weight change, intruder dimensions, the line from base to tuned",
    "merge": "an adapter merged into its base model, with a certificate",
    "export": "write a Composer checkpoint as a Hugging Face model or peft adapter",
}


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    parser, chosen = build_parser(argv[0])
    arguments = parser.parse_args(argv)
    assert chosen is not None, "argparse accepted no command"
    if arguments.traceback:
        os.environ[TRACEBACK_VARIABLE] = "1"
    try:
        return chosen.run(arguments)
    except (OSError, UserError) as error:
        if wants_traceback():
            raise
        print(f"foundry-ext: error: {describe(error)}", file=sys.stderr)
        return 2


def describe(error: Exception) -> str:
    """Return the error on one line; a failed download's is cut, as it tells its whole history."""
    text = one_line(error)
    if isinstance(error, OSError) and "huggingface.co" in text:
        cause = shorten(text, 200, placeholder=" ...")
        return (
            "the Hugging Face hub cannot be reached, or does not have what was asked for; name a"
            f" local file or folder instead ({type(error).__name__}: {cause})"
        )
    return text


def build_parser(command: str) -> tuple[argparse.ArgumentParser, ModuleType | None]:
    """The parser with the arguments of `command` alone, and that command's module."""
    parser = argparse.ArgumentParser(prog="foundry-ext")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subcommands = parser.add_subparsers(metavar="COMMAND", required=True)
    chosen = None
    for name, summary in COMMANDS.items():
        subparser = subcommands.add_parser(name, help=summary, description=summary)
        subparser.add_argument("--traceback", action="store_true", help="of every error")
        if name == command:
            chosen = importlib.import_module(f"foundry_ext.cli.commands.{name.replace('-', '_')}")
            chosen.add_arguments(subparser)
    return parser, chosen


if __name__ == "__main__":
    sys.exit(main())
