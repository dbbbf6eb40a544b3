"""`foundry-ext inspect YAML [key=value ...]`: a page of the first packs as the model sees them."""

import argparse
from pathlib import Path

from foundry_ext.cli.yaml_arguments import add_yaml_arguments, split_one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_yaml_arguments(parser, "a run's YAML file, and overrides")
    add("--loader", choices=("train", "eval"), default="train")
    add("--packs", type=int, default=4, metavar="N", help="packs shown (default 4)")
    add(
        "--out",
        type=Path,
        default=Path("inspect.html"),
        metavar="PAGE.html",
        help="the page to write (default inspect.html)",
    )


def run(arguments: argparse.Namespace) -> int:
    from foundry_ext.preflight.runs import inspect_run

    path, overrides = split_one(arguments)
    inspection = inspect_run(path, overrides, loader=arguments.loader, num_packs=arguments.packs)
    from foundry_ext.preflight.inspect.page import format_inspection  # slow, so after the check

    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(format_inspection(inspection), encoding="utf-8")
    epoch = inspection.epoch
    num_empty = sum(not pack.documents for pack in inspection.packs)
    empty = f" and {num_empty} empty" if num_empty else ""
    print(
        f"{arguments.out}: {len(inspection.packs) - num_empty} of {epoch.num_packs:,} packs{empty};"
        f" {epoch.num_documents:,} documents, {epoch.num_tokens:,} tokens,"
        f" {100 * epoch.packing_efficiency:.2f} % full,"
        f" {100 * epoch.num_loss_tokens / epoch.num_tokens:.1f} % of tokens carry loss;"
        f" {inspection.special_tokens}"
    )
    return 0
