"""The sweep command: runs a sweep file and prints a summary."""

import functools
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from foundry_ext.sweeps.attention import shared_attention
from foundry_ext.sweeps.file import DEFAULT_SEED, expand, read_sweep
from foundry_ext.sweeps.fork_launcher import ForkLauncher
from foundry_ext.sweeps.kept import keep, with_kept
from foundry_ext.sweeps.launchers import SubprocessLauncher, can_fork, threads_each
from foundry_ext.sweeps.plan import CostEstimate, PlannedRun, SweepRunResult, estimate_costs, plan
from foundry_ext.sweeps.runner import SweepRunner
from foundry_ext.sweeps.text import (
    comparison_of,
    duration,
    estimate_hours,
    format_summary,
    format_sweep,
)
from foundry_ext.utils.errors import UserError

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
    results_folder: Path | None = None,
    echo: Callable[[str], None] = lambda line: print(line, flush=True),
) -> list[SweepRunResult]:
    """Run the unfinished runs of a sweep file.

    Args:
        path: The sweep file.
        launcher: "fork" or "subprocess"; None forks if possible, on a CPU with one rank.
        gpus: The devices of each simultaneous run, such as ["0", "1"] or ["0,1", "2,3"].
        parallel: Number of runs at once, for use without `gpus`; None means one.
        retry_failed: Start failed runs again; stopped and killed runs always start again.
        num_runs: Maximum number of runs; method random needs it or the file's run_cap.
        seed: Seed of method random.
        limit_hours: Ask before a sweep whose estimated time is above this or unknown.
        yes: Never ask.
        tokens_per_second: Speed of one run, for the estimate; None takes it from finished runs.
        dry_run: Print what would be started, and start nothing.
        results_folder: Where the records of finished runs are kept; see sweeps/kept.py.
        echo: Prints one line.

    Returns:
        All runs of the sweep in its order, including those that finished earlier.

    Raises:
        FileNotFoundError: There is no file at `path`; nothing was started.
        ValueError: The sweep or an argument is invalid; nothing was started.
    """
    sweep = read_sweep(Path(path))
    planned = plan(sweep, expand(sweep, num_runs=num_runs, seed=seed))
    runs = with_kept(planned, results_folder) if results_folder else planned
    # Runs of which nothing but the record is here; `with_kept` has replaced them.
    elsewhere = {run.name for run in runs if run not in planned}
    launcher = _choose_launcher(launcher, runs, gpus)
    slots = _slots(gpus, parallel, launcher)
    runner = SweepRunner(sweep.name, runs, slots=slots, retry_failed=retry_failed, echo=echo)
    with runner.locked() as lock:
        waiting = runner.refresh_states()
        costs = estimate_costs(waiting, tokens_per_second=tokens_per_second)
        lines = format_sweep(
            sweep.name, runner.statuses, costs, len(slots), launcher, retry_failed=retry_failed
        )
        if elsewhere:
            lines.append(f"{len(elsewhere)} finished by their records in {results_folder}")
        for line in (*lines, *(shlex.join(run.command) for run in waiting if dry_run)):
            echo(line)
        if dry_run:
            for line in [] if waiting else comparison_of(runner.results(), runner.folder):
                echo(line)
            return runner.results()
        if waiting and not yes:
            _confirm(costs, len(slots), limit_hours)
        if results_folder:
            _keep_finished(runner, runs, results_folder, echo)
        if waiting and not _has_gpu(gpus):
            here = [state for name, state in runner.states.items() if name not in elsewhere]
            was_started = any(state.status != "waiting" for state in here)
            runner.environment = shared_attention(
                runner.folder, runs, was_started=was_started, threads=threads_each(len(slots))
            )
        log = runner.folder / "fork_server.log"
        fork = ForkLauncher(parallel=len(slots), log=log, sweep_lock=lock)
        results = runner.run(waiting, fork if launcher == "fork" else SubprocessLauncher())
    for line in (*format_summary(results), *comparison_of(results, runner.folder)):
        echo(line)
    if runner.caught is not None:
        raise KeyboardInterrupt(f"signal {runner.caught}")
    return results


def _keep_finished(
    runner: SweepRunner, runs: Sequence[PlannedRun], folder: Path, echo: Callable[[str], None]
) -> None:
    """Copy the runs that are finished to `folder`, and those to come when they are."""
    runner.on_finished = functools.partial(_keep, folder=folder, echo=echo)
    for run, status in zip(runs, runner.statuses, strict=True):
        if status == "finished":  # by a sweep that was killed before it copied the run
            runner.on_finished(run)


def _keep(run: PlannedRun, *, folder: Path, echo: Callable[[str], None]) -> None:
    """Copy a finished run to `folder`; an error does not end the sweep."""
    try:
        keep(run, folder)
    except (OSError, ValueError) as error:
        echo(f"warning: {run.name} is not kept in {folder}, {error}; the same command tries again")


def _slots(gpus: Sequence[str], parallel: int | None, launcher: str) -> list[dict[str, str]]:
    """Return the environment variables of each of the runs that may run at once."""
    if parallel is not None and parallel < 1:
        raise UserError(f"parallel, {parallel}, is not above 0")
    if not gpus:
        parallel = parallel or 1
        return [threads_each(parallel) if launcher == "subprocess" else {}] * parallel
    single = [device for group in gpus for device in group.split(",")]
    if len(set(single)) < len(single) or not all(device.strip() for device in single):
        raise UserError(f"gpus, {' '.join(gpus)}: a device is named twice or has no number")
    if parallel not in (None, len(gpus)):
        raise UserError(
            f"parallel, {parallel}: with gpus, there are as many runs at once as groups "
            f"of devices, {len(gpus)}; leave parallel out"
        )
    return [{"CUDA_VISIBLE_DEVICES": group} for group in gpus]


def _choose_launcher(asked: str | None, runs: Sequence[PlannedRun], gpus: Sequence[str]) -> str:
    is_macos = sys.platform == "darwin"  # whose system libraries do not survive a fork
    forks = not is_macos and all(can_fork(run.command, run.program) for run in runs)
    if asked is None:
        return "fork" if forks and not _has_gpu(gpus) else "subprocess"
    if asked not in LAUNCHERS:
        raise UserError(f"launcher, {asked!r}, is neither fork nor subprocess")
    if asked == "fork" and gpus:
        raise UserError("launcher fork is for a CPU: a process that uses CUDA cannot be forked")
    if asked == "fork" and is_macos:
        raise UserError("launcher fork is for Linux; use launcher subprocess")
    if asked == "fork" and not forks:
        raise UserError(
            f"launcher fork is for one rank: {shlex.join(runs[0].command[:4])} ... is not composer "
            "or ${interpreter} and the program alone; use launcher subprocess"
        )
    return asked


def _has_gpu(gpus: Sequence[str]) -> bool:
    return bool(gpus) or Path("/dev/nvidia0").exists()


def _confirm(cost_estimates: Sequence[CostEstimate], parallel: int, limit_hours: float) -> None:
    """Ask whether to start a sweep over the limit; raise UserError if the answer is not yes."""
    hours = estimate_hours(cost_estimates, parallel)
    if hours is not None and hours <= limit_hours:
        return
    time_text = "an unknown time" if hours is None else f"about {duration(hours * 3600)}"
    if not sys.stdin.isatty():
        raise UserError(
            f"the sweep takes {time_text}, the limit is {limit_hours:g} h, and nobody is there to "
            "ask; add --yes, or a higher --limit-hours with --tokens-per-second"
        )
    answer = input(f"It takes {time_text}; the limit is {limit_hours:g} h. Start it? [y/N] ")
    if answer.strip().lower() not in ("y", "yes"):
        raise UserError("not started")
