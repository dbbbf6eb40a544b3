"""A sweep from its file to its summary: what `foundry-ext sweep` and the quickstart call."""

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from foundry_ext.config.loading import UsageError
from foundry_ext.sweeps.file import DEFAULT_SEED, expand, read_sweep
from foundry_ext.sweeps.launchers import (
    ForkLauncher,
    SubprocessLauncher,
    can_fork,
    threads_each,
)
from foundry_ext.sweeps.plan import Cost, Outcome, PlannedRun, costs, plan
from foundry_ext.sweeps.runner import SweepRunner
from foundry_ext.sweeps.text import describe, duration, hours, summary

LAUNCHERS = ("fork", "subprocess")


def run_sweep(
    path: Path | str,
    *,
    launcher: str | None = None,
    gpus: Sequence[str] = (),
    parallel: int | None = None,
    retry_failed: bool = False,
    num_runs: int | None = None,
    seed: int = DEFAULT_SEED,
    limit_hours: float = 1.0,
    yes: bool = True,
    tokens_per_second: float | None = None,
    dry_run: bool = False,
    say: Callable[[str], None] = lambda line: print(line, flush=True),
) -> list[Outcome]:
    """Runs what is not finished yet of the sweep file at `path`; all runs, in its order.

    Args:
        launcher: fork or subprocess; None: fork where it can be, on a CPU with one rank.
        gpus: the devices of each run under way at once, such as ["0", "1"] or ["0,1", "2,3"].
        parallel: runs at once, without `gpus`; None is one.
        retry_failed: starts failed runs again; stopped and killed ones always are.
        num_runs, seed: of method random; num_runs also cuts a grid short.
        limit_hours, yes: over this estimate, or without one, it asks first unless `yes`.
        tokens_per_second: of one run, for the estimate; None: from finished runs.
        dry_run: says what would be started and starts nothing.
        say: prints one line.

    Raises:
        FileNotFoundError, ValueError: before anything is started.
    """
    sweep = read_sweep(Path(path))
    runs = plan(sweep, expand(sweep, num_runs=num_runs, seed=seed))
    slots, kind = _slots(gpus, parallel), _launcher(launcher, runs, gpus)
    if kind == "subprocess" and not gpus:
        slots = [threads_each(len(slots))] * len(slots)
    runner = SweepRunner(sweep.name, runs, slots=slots, retry_failed=retry_failed, say=say)
    with runner.locked() as lock:
        waiting = runner.look()
        prices = costs(waiting, tokens_per_second=tokens_per_second)
        _announce(runner, prices, kind)
        if dry_run:
            for run in waiting:
                say(shlex.join(run.command))
            return runner.outcomes()
        if waiting and not yes:
            _ask(prices, len(slots), limit_hours)
        log = runner.folder / "fork_server.log"
        fork = ForkLauncher(parallel=len(slots), log=log, sweep_lock=lock)
        outcomes = runner.run(waiting, fork if kind == "fork" else SubprocessLauncher())
    for line in summary(outcomes, runner.folder / "report"):
        say(line)
    if runner.caught is not None:
        raise KeyboardInterrupt(f"signal {runner.caught}")
    return outcomes


def _announce(runner: SweepRunner, prices: Sequence[Cost], launcher: str) -> None:
    for line in describe(
        runner.name,
        [runner.states[run.name].status for run in runner.runs],
        prices,
        parallel=len(runner.slots),
        launcher=launcher,
        retry_failed=runner.retry_failed,
    ):
        runner.say(line)


def _slots(gpus: Sequence[str], parallel: int | None) -> list[dict[str, str]]:
    if parallel is not None and parallel < 1:
        raise UsageError(f"parallel, {parallel}, is not above 0")
    if not gpus:
        return [{} for _ in range(parallel or 1)]
    single = [device for group in gpus for device in group.split(",")]
    if len(set(single)) < len(single) or not all(device.strip() for device in single):
        raise UsageError(f"gpus, {' '.join(gpus)}: a device is named twice or has no number")
    if parallel not in (None, len(gpus)):
        raise UsageError(
            f"parallel, {parallel}: with gpus, there are as many runs at once as groups "
            f"of devices, {len(gpus)}; leave parallel out"
        )
    return [{"CUDA_VISIBLE_DEVICES": group} for group in gpus]


def _launcher(asked: str | None, runs: Sequence[PlannedRun], gpus: Sequence[str]) -> str:
    forks = all(can_fork(run.command, run.program) for run in runs)
    has_gpu = bool(gpus) or Path("/dev/nvidia0").exists()
    if asked is None:
        return "fork" if forks and not has_gpu else "subprocess"
    if asked not in LAUNCHERS:
        raise UsageError(f"launcher, {asked!r}, is neither fork nor subprocess")
    if asked == "fork" and gpus:
        raise UsageError("launcher fork is for a CPU: a process that uses CUDA cannot be forked")
    if asked == "fork" and not forks:
        raise UsageError(
            f"launcher fork is for one rank: {shlex.join(runs[0].command[:4])} ... is not composer "
            "or ${interpreter} and the program alone; use launcher subprocess"
        )
    return asked


def _ask(prices: Sequence[Cost], parallel: int, limit_hours: float) -> None:
    """Returns if the sweep is to start."""
    estimate = hours(prices, parallel)
    if estimate is not None and estimate <= limit_hours:
        return
    time_text = "an unknown time" if estimate is None else f"about {duration(estimate * 3600)}"
    if not sys.stdin.isatty():
        raise UsageError(
            f"the sweep takes {time_text}, the limit is {limit_hours:g} h, and nobody is there to "
            "ask; add --yes, or a higher --limit-hours with --tokens-per-second"
        )
    answer = input(f"It takes {time_text}; the limit is {limit_hours:g} h. Start it? [y/N] ")
    if answer.strip().lower() not in ("y", "yes"):
        raise UsageError("not started")
