"""`foundry-ext sweep FILE`: runs a W&B sweep file on this machine, without a server."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foundry_ext.sweeps.plan import SweepRunResult

# Options that a dry run passes on to the real one, with their defaults.
_OPTIONS: dict[str, Any] = {
    **dict.fromkeys(("launcher", "gpus", "parallel", "runs", "results", "tokens-per-second")),
    "seed": 17,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="a sweep in W&B's format, method grid or random")
    add("--dry-run", action="store_true", help="print what would be started, and start nothing")
    add("--retry-failed", action="store_true", help="also start failed runs again")
    add(
        "--launcher",
        choices=("fork", "subprocess"),
        help="fork: on a CPU, imports once (default there); subprocess: the sweep's own command",
    )
    add("--gpus", metavar="0,1", help="devices, one run on each; 0+1,2+3 gives each run two")
    add("--parallel", type=int, metavar="N", help="runs at once on a CPU (default: 1)")
    add("--runs", type=int, metavar="N", help="number of runs of a random sweep; cuts a grid short")
    add("--seed", type=int, default=17, help="seed of a random sweep (default: %(default)s)")
    add(
        "--limit-hours",
        type=float,
        default=1.0,
        metavar="H",
        help="ask before a sweep that is estimated to take longer (default: %(default)g)",
    )
    add("--yes", action="store_true", help="do not ask")
    add(
        "--results",
        type=Path,
        metavar="FOLDER",
        help="copy the records of finished runs there, and take those in it as finished",
    )
    add(
        "--tokens-per-second",
        type=float,
        metavar="X",
        help="throughput of one run, for the estimate (default: that of finished runs)",
    )


def run(arguments: argparse.Namespace) -> int:
    from foundry_ext.sweeps.run import run_sweep

    gpus = (arguments.gpus or "").replace(" ", "").split(",") if arguments.gpus else []
    try:
        outcomes = run_sweep(
            arguments.file,
            launcher=arguments.launcher,
            gpus=[group.replace("+", ",") for group in gpus],
            parallel=arguments.parallel,
            retry_failed=arguments.retry_failed,
            num_runs=arguments.runs,
            seed=arguments.seed,
            limit_hours=arguments.limit_hours,
            yes=arguments.yes,
            tokens_per_second=arguments.tokens_per_second,
            dry_run=arguments.dry_run,
            results_folder=arguments.results,
        )
    except KeyboardInterrupt:
        return 130
    if arguments.dry_run:
        _print_start(arguments, outcomes)
        return 0
    return 0 if all(outcome.status == "finished" for outcome in outcomes) else 1


def _print_start(arguments: argparse.Namespace, outcomes: "Sequence[SweepRunResult]") -> None:
    """Print the command that starts the runs of a dry run, if there are any to start."""
    from foundry_ext.sweeps.state import is_started_again

    again = arguments.retry_failed
    if not any(is_started_again(outcome.status, retry_failed=again) for outcome in outcomes):
        return
    options = ["--retry-failed"] if again else []
    for name, default in _OPTIONS.items():
        value = getattr(arguments, name.replace("-", "_"))
        if value != default:
            options += [f"--{name}", str(value)]
    command = ["foundry-ext", "sweep", str(arguments.file), *options, "--yes"]
    print(f"start: {shlex.join(command)}")
