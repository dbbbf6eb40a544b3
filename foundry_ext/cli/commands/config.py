"""`foundry-ext config YAML [key=value ...]`: a run's YAML with every choice filled in."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "arguments",
        nargs="+",
        metavar="FILE.yaml | key=value",
        help="one run's YAML file, and overrides such as variables.size=360m",
    )


def run(arguments: argparse.Namespace) -> int:
    from omegaconf import OmegaConf

    from foundry_ext.config.loading import load_config, split_arguments
    from foundry_ext.utils.errors import UserError, one_line
    from foundry_ext.utils.redaction import redact

    files, overrides = split_arguments(arguments.arguments)
    if len(files) > 1:
        raise UserError(f"{files[1]}: {len(files)} files; config prints one run, so give one")
    config = OmegaConf.to_container(load_config(files[0], overrides), resolve=True)
    assert isinstance(config, dict)
    # Everything that read a variable has its value now, so overriding one would change nothing.
    config.pop("variables", None)
    print(f"# {one_line(' '.join([str(files[0]), *map(redact, overrides)]))}")
    print(OmegaConf.to_yaml(OmegaConf.create(redact(config))), end="")
    return 0
