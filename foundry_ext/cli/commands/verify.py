"""`foundry-ext verify YAML [key=value ...]`: packed is unpacked, resumed is uninterrupted."""

import argparse

from foundry_ext.utils.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "arguments",
        nargs="+",
        metavar="FILE.yaml | key=value",
        help="a run's YAML file, and overrides",
    )
    parser.add_argument("--steps", type=int, default=4, metavar="N", help="trained (default 4)")
    parser.add_argument("--packs", type=int, default=2, metavar="N", help="compared (default 2)")
    parser.add_argument(
        "--tokens", type=int, default=512, metavar="N", help="of a pack, at most (default 512)"
    )


def run(arguments: argparse.Namespace) -> int:
    from omegaconf import OmegaConf

    from foundry_ext.config.loading import load_config, split_arguments

    files, overrides = split_arguments(arguments.arguments)
    if len(files) > 1:
        raise UserError(f"{files[1]}: a second file; verify looks at one")
    config = OmegaConf.to_container(load_config(files[0], overrides), resolve=True)
    assert isinstance(config, dict)

    from foundry_ext.preflight.components import check_components
    from foundry_ext.preflight.verify.verify import (  # torch and llm-foundry: some 20 seconds
        render,
        verify_config,
    )

    check_components(config)  # pyright: ignore[reportArgumentType]
    found = verify_config(
        config,  # pyright: ignore[reportArgumentType]
        name=str(files[0]),
        steps=arguments.steps,
        packs=arguments.packs,
        tokens=arguments.tokens,
    )
    print(render(found))
    return 0 if found.passed else 1
