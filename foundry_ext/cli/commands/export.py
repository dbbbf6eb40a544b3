"""`foundry-ext export CHECKPOINT OUT`: a Composer checkpoint as a Hugging Face folder."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a Composer .pt file")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write")


def run(arguments: argparse.Namespace) -> int:
    from foundry_ext.checkpoints.export import export_checkpoint
    from foundry_ext.checkpoints.next_steps import describe_export

    out = export_checkpoint(arguments.checkpoint, arguments.out)
    print(describe_export(out, arguments.checkpoint))
    return 0
