"""Command `python -m experiments.quickstart [prepare] [--fast | --real] [--seeds 17 18 ...]`."""

import argparse
import os
import sys
import time
from collections.abc import Sequence

from experiments.quickstart import real
from experiments.quickstart.data import prepare
from experiments.quickstart.story import (
    FOLDER,
    report,
    run_grid,
    run_matched,
    show_base,
    train_base,
)
from foundry_ext.utils.constants import CPU_ATTENTION
from foundry_ext.utils.output import redact_output

# The first runs the grid of learning rates; all run at matched learning. Three would be enough for
# an interval, but after Holm's correction over six pairs they leave most differences undecided.
SEEDS = [17, 18, 19, 20, 21]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.quickstart")
    parser.add_argument(
        "only", nargs="?", choices=["prepare"], help="only write data and tokenizer"
    )
    parser.add_argument("--fast", action="store_true", help="one learning rate, one seed")
    parser.add_argument("--real", action="store_true", help="SmolLM2-135M itself, two methods")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, metavar="SEED")
    arguments = parser.parse_args(argv)
    if len(set(arguments.seeds)) < len(arguments.seeds):
        parser.error(f"--seeds {arguments.seeds}: one is given twice; give different seeds")
    # "auto" would measure; the same kernel on every processor leaves fewer differences.
    os.environ.setdefault(CPU_ATTENTION, "blockwise")
    started = time.monotonic()
    try:
        if arguments.real:
            real.run()
        else:
            prepare(FOLDER)
            if arguments.only is None:
                _run(arguments.seeds, fast=arguments.fast)
    except ValueError as error:
        print(f"quickstart: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("quickstart: stopped; the same command continues from here", file=sys.stderr)
        return 130
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    print(f"the quickstart took {minutes} min {seconds} s")
    return 0


def _run(seeds: list[int], *, fast: bool) -> None:
    first = seeds[0]
    print("\n[1/4] the base model: about two and a half minutes on two idle cores", flush=True)
    train_base()
    show_base()
    if fast:
        print(f"\n[2/4] 4 runs, one learning rate, seed {first}: about a minute", flush=True)
        grid, matched = run_grid(first, fast=True), []
        print("\n[3/4] left out by --fast: matched learning rates, more seeds", flush=True)
    else:
        print(
            f"\n[2/4] 20 runs, five learning rates, seed {first}: about three minutes", flush=True
        )
        grid = run_grid(first, fast=False)
        print(f"\n[3/4] {4 * len(seeds)} runs at matched learning: about three minutes", flush=True)
        matched = run_matched(grid, seeds)
    print(
        "\n[4/4] the weights of one run per method, and the report: about half a minute", flush=True
    )
    # A report of other seeds, or of one seed, does not replace the default report.
    used = seeds[:1] if fast else seeds
    kind = "" if used == SEEDS else "-" + "-".join(map(str, used))
    report(grid, matched, first, FOLDER / f"report{kind}")


if __name__ == "__main__":
    redact_output()
    sys.exit(main())
