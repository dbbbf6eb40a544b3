"""`foundry-ext inspect YAML [key=value ...]`: the first packs as the model gets them, as a page."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "arguments",
        nargs="+",
        metavar="FILE.yaml | key=value",
        help="a run's YAML file, and overrides",
    )
    parser.add_argument("--loader", choices=("train", "eval"), default="train")
    parser.add_argument("--packs", type=int, default=4, metavar="N", help="packs shown (default 4)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("inspect.html"),
        metavar="PAGE.html",
        help="the page to write (default inspect.html)",
    )


def run(arguments: argparse.Namespace) -> int:
    from omegaconf import OmegaConf

    from foundry_ext.config.loading import UsageError, load_config, split_arguments

    files, overrides = split_arguments(arguments.arguments)
    if len(files) > 1:
        raise UsageError(f"{files[1]}: a second file; inspect looks at one")
    config = OmegaConf.to_container(load_config(files[0], overrides), resolve=True)
    assert isinstance(config, dict)

    from foundry_ext.preflight.inspect.packs import inspect_config  # llm-foundry: some 20 seconds
    from foundry_ext.preflight.inspect.page import format_inspection

    inspection = inspect_config(
        config,  # pyright: ignore[reportArgumentType]
        name=str(files[0]),
        loader=arguments.loader,
        num_packs=arguments.packs,
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(format_inspection(inspection), encoding="utf-8")
    epoch = inspection.epoch
    print(
        f"{arguments.out}: {len(inspection.packs)} of {epoch.num_packs:,} packs;"
        f" {epoch.num_documents:,} documents, {epoch.num_tokens:,} tokens,"
        f" {100 * epoch.packing_efficiency:.2f} % full,"
        f" {100 * epoch.num_loss_tokens / epoch.num_tokens:.1f} % of tokens carry loss"
    )
    return 0
