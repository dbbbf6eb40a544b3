"""`foundry-ext plan YAML [key=value ...]`: what a run would do, its memory and its time."""

import argparse
import re


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "arguments",
        nargs="+",
        metavar="FILE.yaml | key=value",
        help="runs' YAML files, each planned by itself; overrides hold for every file",
    )
    parser.add_argument(
        "--memory",
        type=card_memory,
        action="append",
        default=[],
        metavar="24GB",
        help="of another device than the cards named in the plan; repeatable",
    )
    parser.add_argument(
        "--ranks",
        type=int,
        default=1,
        metavar="N",
        help="processes, a device each, that the run is to be trained by (default: %(default)s)",
    )


def card_memory(text: str) -> tuple[str, float]:
    """`24GB` -> (`24 GB`, bytes), a card's GB being 2**30 bytes."""
    match = re.fullmatch(r"([0-9.]+) *(?:GB|GiB)?", text, re.IGNORECASE)
    if match is None or not float(match[1]) > 0:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number of gigabytes, such as 24GB")
    return f"{match[1]} GB", float(match[1]) * 2**30


def run(arguments: argparse.Namespace) -> int:
    from omegaconf import OmegaConf

    from foundry_ext.config.loading import load_config, split_arguments

    files, overrides = split_arguments(arguments.arguments)
    configs = [(path, load_config(path, overrides)) for path in files]

    from foundry_ext.preflight.components import check_components
    from foundry_ext.preflight.plan.plan import plan_config  # llm-foundry: some 20 seconds
    from foundry_ext.preflight.plan.text import render

    for number, (path, config) in enumerate(configs):
        resolved = OmegaConf.to_container(config, resolve=True)
        assert isinstance(resolved, dict)
        check_components(resolved)  # pyright: ignore[reportArgumentType]
        plan = plan_config(
            resolved,  # pyright: ignore[reportArgumentType]
            name=str(path),
            num_ranks=arguments.ranks,
        )
        print("\n" * bool(number) + render(plan, memory=dict(arguments.memory)))
    return 0
