"""`foundry-ext config YAML [key=value ...]`: a run's YAML with every choice filled in."""

import argparse

from foundry_ext.cli.yaml_arguments import add_yaml_arguments, split_one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_yaml_arguments(parser, "one run's YAML file, and overrides such as variables.size=360m")


def run(arguments: argparse.Namespace) -> int:
    from omegaconf import OmegaConf

    from foundry_ext.config.loading import load_config
    from foundry_ext.utils.errors import one_line
    from foundry_ext.utils.redaction import redact

    path, overrides = split_one(arguments)
    config = OmegaConf.to_container(load_config(path, overrides), resolve=True)
    assert isinstance(config, dict)
    # Everything that read a variable has its value now, so overriding one would change nothing.
    config.pop("variables", None)
    print(f"# {one_line(' '.join([str(path), *map(redact, overrides)]))}")
    print(OmegaConf.to_yaml(OmegaConf.create(redact(config))), end="")
    return 0
