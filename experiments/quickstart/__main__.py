"""Command `python -m experiments.quickstart [prepare] [--fast] [--seeds 17 18 ...]`."""

import argparse
import sys
import time
from collections.abc import Sequence

from experiments.quickstart.data import prepare
from experiments.quickstart.story import (
    FOLDER,
    fine_tune,
    read_grid,
    report,
    show_base,
    train_base,
)
from foundry_ext.utils.output import redact_output

# Three would be enough for an interval. But with two degrees of freedom, hardly any difference is
# distinguishable from chance after Holm's correction over six pairs.
SEEDS = [17, 18, 19, 20, 21]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.quickstart")
    parser.add_argument(
        "only", nargs="?", choices=["prepare"], help="only write data and tokenizer"
    )
    parser.add_argument("--fast", action="store_true", help="one learning rate, one seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, metavar="SEED")
    arguments = parser.parse_args(argv)
    if len(set(arguments.seeds)) < len(arguments.seeds):
        parser.error(f"--seeds {arguments.seeds}: one is given twice; give different seeds")
    started = time.monotonic()
    try:
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
    train_base()
    show_base()
    used = seeds[:1] if fast else seeds
    records = fine_tune(used, fast=fast)
    # A report of other seeds, or of one seed, does not replace the default report.
    kind = "" if used == SEEDS else "-" + "-".join(map(str, used))
    configs = read_grid()["parameters"]["config"]["values"]
    report(records, configs, used[0], FOLDER / f"report{kind}")


if __name__ == "__main__":
    redact_output()
    sys.exit(main())
