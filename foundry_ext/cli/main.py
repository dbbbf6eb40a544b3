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
from foundry_ext.utils.output import quiet_libraries, redact_output, redacted_output
from foundry_ext.utils.redaction import remember_secrets

# name -> what it does; `check-fair` is foundry_ext/cli/commands/check_fair.py
COMMANDS = {
    "new": "write the files of an experiment on your own data into a new folder",
    "config": "print a run's YAML with every variable and choice filled in",
    "prepare": "tokenise rows once, into shards, for data of any size",
    "inspect": "write an HTML page of the first packs as the model sees them",
    "plan": "estimate steps, tokens, memory and time of a run; nothing is trained",
    "verify": "train a few steps and check that packing and resumption change nothing",
    "parity": "compare a model with transformers' Llama, layer by layer",
    "check-fair": "name every difference between runs that should differ by method only",
    "sweep": "run a W&B sweep file on this machine, without a server",
    "compare": "compare runs: learning, forgetting and cost as comparison.md, an HTML page, plots",
    "dashboard": "make a W&B dashboard of learning, forgetting and throughput",
    "eval": "measure learning and forgetting of a checkpoint, a model or an adapter",
    "tasks": "write evaluation tasks as JSONL, from the hub or a local file",
    "analyse": "measure rank and intruder dimensions of the weight change",
    "merge": "merge an adapter into its base model, with a certificate",
    "export": "write a Composer checkpoint as a Hugging Face model or peft adapter",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return the exit code; 2 for a mistake of the user."""
    if argv is None:  # this process is the command: to its end, as a traceback comes after main
        redact_output()
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    remember_secrets(arguments)
    quiet_libraries()
    with redacted_output():
        return _main(arguments)


def _main(argv: list[str]) -> int:
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
    """Return the error on one line, with the long history of a failed download cut."""
    text = one_line(error)
    if isinstance(error, OSError) and "huggingface.co" in text:
        cause = shorten(text, 200, placeholder=" ...")
        return (
            "the Hugging Face hub cannot be reached, or does not have what was asked for; name a"
            f" local file or folder instead ({type(error).__name__}: {cause})"
        )
    return text


def build_parser(command: str) -> tuple[argparse.ArgumentParser, ModuleType | None]:
    """Return a parser with the arguments of `command` only, and the module of that command."""
    parser = argparse.ArgumentParser(prog="foundry-ext")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subcommands = parser.add_subparsers(metavar="COMMAND", required=True)
    chosen = None
    for name, summary in COMMANDS.items():
        subparser = subcommands.add_parser(name, help=summary, description=summary)
        subparser.add_argument(
            "--traceback", action="store_true", help="show the traceback of an error"
        )
        if name == command:
            chosen = importlib.import_module(f"foundry_ext.cli.commands.{name.replace('-', '_')}")
            chosen.add_arguments(subparser)
    return parser, chosen


if __name__ == "__main__":
    sys.exit(main())
