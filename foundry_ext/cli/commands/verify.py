"""`foundry-ext verify YAML [key=value ...]`: checks packing and resumption of a run."""

import argparse

from foundry_ext.cli.yaml_arguments import add_yaml_arguments, split_one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_yaml_arguments(parser, "a run's YAML file, and overrides")
    add = parser.add_argument
    add("--steps", type=int, default=4, metavar="N", help="steps to train (4)")
    add("--packs", type=int, default=2, metavar="N", help="packs to compare (2)")
    add("--tokens", type=int, default=512, metavar="N", help="tokens per pack, at most (512)")


def run(arguments: argparse.Namespace) -> int:
    from foundry_ext.preflight.runs import verify_run

    path, overrides = split_one(arguments)
    result = verify_run(
        path, overrides, steps=arguments.steps, packs=arguments.packs, tokens=arguments.tokens
    )
    from foundry_ext.preflight.verify.verify import format_verification  # slow, so after the check

    print(format_verification(result))
    return 0 if result.passed else 1
