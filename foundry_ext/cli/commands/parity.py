"""`foundry-ext parity MODEL`: compares the model with transformers' Llama, layer by layer."""

import argparse
from pathlib import Path

from foundry_ext.utils.errors import naming

_DTYPES = ("fp32", "bf16", "fp16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL",
        help="a Hugging Face folder or a Composer .pt file; or 135m, 360m or 1.7b, with random"
        " weights. It needs about 16 bytes of memory per parameter",
    )
    add("--dtypes", nargs="+", choices=_DTYPES, default=_DTYPES, help="default: all three")
    add(
        "--backends",
        nargs="+",
        metavar="NAME",
        help="attention backends (default: all that can run on this device)",
    )
    add("--tokens", type=int, default=64, metavar="N", help="tokens to compare on (default 64)")
    add("--out", type=Path, metavar="FOLDER", help="write index.html and its plots here")


def run(arguments: argparse.Namespace) -> int:
    from foundry_ext.preflight.parity.models import load_pair
    from foundry_ext.preflight.parity.parity import check_arguments, compare
    from foundry_ext.preflight.parity.text import format_parity

    backends = check_arguments(arguments.backends, arguments.tokens)
    if arguments.out is not None:
        with naming(f"--out, {arguments.out}", (OSError,)):
            arguments.out.mkdir(parents=True, exist_ok=True)
    parity = compare(
        load_pair(arguments.model),
        model=arguments.model,
        dtypes=tuple(dict.fromkeys(arguments.dtypes)),
        backends=backends,
        num_tokens=arguments.tokens,
    )
    print(format_parity(parity))
    if arguments.out is not None:
        from foundry_ext.preflight.parity.page import write_page  # slow

        write_page(parity, arguments.out)
        print(f"{arguments.out}/index.html")
    return 1 if parity.beyond() or not parity.columns else 0
