"""`foundry-ext verify YAML [key=value ...]`: checks packing and resumption of a run."""

import argparse

from foundry_ext.utils.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "arguments",
        nargs="+",
        metavar="FILE.yaml | key=value",
        help="a run's YAML file, and overrides",
    )
    parser.add_argument("--steps", type=int, default=4, metavar="N", help="steps to train (4)")
    parser.add_argument("--packs", type=int, default=2, metavar="N", help="packs to compare (2)")
    parser.add_argument(
        "--tokens",
        type=int,
        default=512,
        metavar="N",
        help="tokens per pack, at most (512)",
    )


def run(arguments: argparse.Namespace) -> int:
    from foundry_ext.config.loading import split_arguments
    from foundry_ext.preflight.runs import verify_run

    files, overrides = split_arguments(arguments.arguments)
    if len(files) > 1:
        raise UserError(f"{files[1]}: a second file; verify looks at one")
    result = verify_run(
        files[0],
        overrides,
        steps=arguments.steps,
        packs=arguments.packs,
        tokens=arguments.tokens,
    )
    from foundry_ext.preflight.verify.verify import format_verification  # slow, so after the check

    print(format_verification(result))
    return 0 if result.passed else 1
