"""`foundry-ext merge ADAPTER OUT`: merges an adapter into its base model, with a certificate."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("adapter", type=Path, metavar="ADAPTER", help="a peft folder or a Composer .pt file")
    add("out", type=Path, metavar="OUT", help="the folder to write")
    add("--base", help="the base model, if not the one that the adapter names")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add(
        "--tolerance",
        type=float,
        help="largest difference of a logit before and after (default: 1e-3; bfloat16: 0.5)",
    )
    add(
        "--text",
        type=Path,
        metavar="FILE",
        help="held-out text to compare on, instead of the built-in one",
    )


def run(arguments: argparse.Namespace) -> int:
    from foundry_ext.checkpoints.loading import CERTIFICATE
    from foundry_ext.checkpoints.merge import TEXT, merge_adapter
    from foundry_ext.checkpoints.next_steps import next_steps

    certificate = merge_adapter(
        arguments.adapter,
        arguments.out,
        base=arguments.base,
        dtype=arguments.dtype,
        tolerance=arguments.tolerance,
        text=arguments.text.read_text(encoding="utf-8") if arguments.text else TEXT,
    )
    written = certificate["written"]
    print(
        f"{arguments.out}: {certificate['method']} merged into {certificate['base']},"
        f" {certificate['dtype']}. Logits differ by at most {written['largest']:.2g},"
        f" {written['mean']:.2g} on average; the likeliest token is the same at"
        f" {written['argmax_agreement']:.2%} of positions ({CERTIFICATE})\n"
        f"{next_steps(arguments.out, arguments.adapter)}"
    )
    return 0
