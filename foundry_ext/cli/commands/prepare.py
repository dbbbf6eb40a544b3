"""`foundry-ext prepare YAML --out FOLDER`: tokenises a source once, into shards for training."""

import argparse
import re

from foundry_ext.cli.yaml_arguments import add_yaml_arguments, split_one
from foundry_ext.utils.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_yaml_arguments(parser, "a run's YAML file, and overrides")
    add("--out", required=True, metavar="FOLDER", help="a folder, or a URI such as s3://bucket/edu")
    add("--loader", choices=("train", "eval"), default="train")
    add("--source", type=int, default=0, metavar="N", help="which of dataset.datasets, from 0")
    add("--workers", type=int, metavar="N", help="processes (default: the cores that are ours)")
    add("--part", metavar="I/N", help="make part I of N only, on any machine, in any order")
    add("--merge", action="store_true", help="write the index of all parts; tokenise nothing")
    add(
        "--shard-size",
        default="64mb",
        metavar="SIZE",
        help="bytes of a shard, about (default 64mb)",
    )


def run(arguments: argparse.Namespace) -> int:
    part = _part(arguments.part)
    if part is not None and arguments.merge:
        raise UserError("--merge: not with --part; run it once, after all parts")
    if arguments.workers is not None and arguments.workers < 1:
        raise UserError(f"--workers: {arguments.workers} must be at least 1")
    path, overrides = split_one(arguments)
    from foundry_ext.preflight.preparing import merge, prepare_run

    if arguments.merge:
        prepared = merge(arguments.out)
    else:
        prepared = prepare_run(
            path,
            overrides,
            loader=arguments.loader,
            out=arguments.out,
            workers=arguments.workers,
            part=part,
            source=arguments.source,
            shard_size=arguments.shard_size,
        )
    what = f"{prepared.rows:,} rows, {prepared.tokens:,} tokens in {prepared.shards:,} shards"
    if prepared.has_index:
        loader = f"{arguments.loader}_loader.dataset.prepared={arguments.out}"
        print(f"{arguments.out}: {what}; train with {loader}")
    else:
        print(f"{arguments.out}: part {arguments.part}: {what}; after all parts: --merge")
    return 0


def _part(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--part: {text!r} is no part; write 1/8, 2/8, ... 8/8")
    return int(match[1]), int(match[2])
