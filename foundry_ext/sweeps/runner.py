"""The runner of a sweep: starts each run exactly once, even if the sweep is killed in between.

It learns which runs have finished from their records, which failed or were stopped from the state
of the sweep, and which still run after a killed sweep from their locks (state.py).
"""

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from foundry_ext.records.record import now
from foundry_ext.sweeps.launchers import Job, Launcher, Orphan, Process
from foundry_ext.sweeps.plan import PlannedRun, SweepRunResult, finished_otherwise
from foundry_ext.sweeps.state import (
    RunState,
    claim,
    is_started_again,
    read_run_record,
    read_state,
    status_at_end,
    status_now,
    wall_seconds,
    write_state,
)
from foundry_ext.sweeps.text import duration, last_error, target_loss
from foundry_ext.utils.errors import UserError
from foundry_ext.utils.processes import handling_signals

FOLDER = Path("outputs/sweeps")
POLL_SECONDS = 0.2
GRACE_SECONDS = 60.0
"""Time that a run has to save its work after Ctrl-C before it is killed."""
_LOCK_WAIT_SECONDS = 120.0


@dataclass(kw_only=True)
class _ActiveRun:
    """A run that was started and has not ended."""

    run: PlannedRun
    process: Process
    slot: int | None
    """None if an earlier sweep started it."""
    begin: float = field(default_factory=time.monotonic)
    is_interrupted: bool = False


class SweepRunner:
    """The runs of one sweep and the files that remember them.

    Args:
        name: Name of the sweep.
        runs: All runs of the sweep.
        slots: Variables for each of the runs that may run at once.
        retry_failed: Whether to start failed runs again.
        echo: Prints one line.
    """

    def __init__(
        self,
        name: str,
        runs: Sequence[PlannedRun],
        *,
        slots: Sequence[Mapping[str, str]],
        retry_failed: bool = False,
        echo: Callable[[str], None] = print,
    ) -> None:
        self.name, self.runs, self.slots, self.echo = name, list(runs), list(slots), echo
        self.retry_failed = retry_failed
        self.folder = FOLDER / name
        self.environment: dict[str, str] = {}
        """Variables of every run."""
        self.on_finished: Callable[[PlannedRun], None] = lambda run: None
        self.states: dict[str, RunState] = {}
        self.caught: int | None = None
        """The first signal that was received."""
        self._num_signals = 0
        self._deadline: float | None = None
        self._active: list[_ActiveRun] = []
        self._finished_seconds: list[float] = []

    @contextmanager
    def locked(self) -> Iterator[int]:
        """Hold the sweep's lock; raise UserError if another process runs this sweep."""
        path = self.folder / "lock"
        deadline = time.monotonic() + _LOCK_WAIT_SECONDS
        while (lock := claim(path)) is None:
            holder = path.read_text(encoding="utf-8").strip()
            if _is_alive(holder) or time.monotonic() > deadline:
                raise UserError(
                    f"sweep {self.name} is running already, as process {holder or 'unknown'}; "
                    f"wait for it or stop it (its lock is {path})"
                )
            time.sleep(POLL_SECONDS)  # a child of a killed sweep closes its copy soon
        try:
            os.ftruncate(lock, 0)
            os.pwrite(lock, str(os.getpid()).encode(), 0)
            yield lock
        finally:
            os.close(lock)

    def refresh_states(self) -> list[PlannedRun]:
        """Update the states of all runs from disk and return the runs to start."""
        # Runs of an earlier version of the sweep file stay in the state.
        self.states = read_state(self.folder / "state.json")
        waiting = []
        for run in self.runs:
            state = self.states.setdefault(run.name, RunState())
            record = read_run_record(run.record)
            if record.get("status") == "finished":
                difference = finished_otherwise(run, record)
                if difference:
                    raise UserError(
                        f"{run.record} is of a finished run with {difference}; move it away, or "
                        "give the YAML another run_name"
                    )
            orphan = Orphan(self.job(run), state.pid)
            if orphan.is_running:
                state.status = "running"
                self._active.append(_ActiveRun(run=run, process=orphan, slot=None))
                continue
            state.status = status_now(state, record.get("status"))
            if state.status == "finished":
                state.seconds = state.seconds or wall_seconds(record)
            if is_started_again(state.status, retry_failed=self.retry_failed):
                waiting.append(run)
        return waiting

    def job(self, run: PlannedRun, slot: Mapping[str, str] | None = None) -> Job:
        return Job(
            command=run.command,
            program=run.program,
            arguments=run.arguments,
            log=self.folder / "logs" / f"{run.name}.log",
            lock=self.folder / "locks" / run.name,
            environment={**(slot or {}), **self.environment, "FOUNDRY_EXT_SWEEP": self.name},
        )

    def run(self, waiting: Sequence[PlannedRun], launcher: Launcher) -> list[SweepRunResult]:
        """Start the waiting runs, and return once no run of the sweep is left running."""
        queue = list(waiting)
        for folder in ("logs", "locks"):
            (self.folder / folder).mkdir(parents=True, exist_ok=True)
        self._save()
        for active in self._active:
            self.echo(f"{active.run.name}: still running since an earlier sweep; waiting for it")
        with handling_signals(self._receive):
            try:
                while self._active or (queue and self.caught is None):
                    while queue and self.caught is None and (slot := self._free_slot()) is not None:
                        self._start(queue.pop(0), slot, launcher)
                    if self.caught is not None:
                        self._stop(launcher)
                    for active in list(self._active):
                        self._poll(active, num_waiting=len(queue))
                    if self._active:
                        time.sleep(POLL_SECONDS)
            finally:
                try:
                    self._save()
                finally:
                    launcher.close()
        return self.results()

    @property
    def statuses(self) -> list[str]:
        return [self.states[run.name].status for run in self.runs]

    def results(self) -> list[SweepRunResult]:
        return [
            SweepRunResult(
                name=run.name,
                status=self.states[run.name].status,
                exit_code=self.states[run.name].exit_code,
                seconds=self.states[run.name].seconds,
                record=run.record,
                log=self.job(run).log,
            )
            for run in self.runs
        ]

    def _free_slot(self) -> int | None:
        taken = [active.slot for active in self._active]
        # A run of an earlier sweep counts too, although its device is unknown.
        free = [slot for slot in range(len(self.slots)) if slot not in taken]
        return free[0] if len(self._active) < len(self.slots) else None

    def _start(self, run: PlannedRun, slot: int, launcher: Launcher) -> None:
        state = self.states[run.name]
        state.status, state.started, state.exit_code, state.error = "running", now(), None, None
        state.attempts += 1
        self._save()  # before there is a process, which a restarted sweep finds by its lock
        job = self.job(run, self.slots[slot])
        with job.log.open("a", encoding="utf-8") as log:
            print(f"--- attempt {state.attempts}, {state.started}", file=log)
        process = launcher.start(job)
        state.pid = process.pid
        self._active.append(_ActiveRun(run=run, process=process, slot=slot))
        self._save()
        self.echo(f"{run.name}: started")

    def _poll(self, active: _ActiveRun, *, num_waiting: int) -> None:
        state = self.states[active.run.name]
        code = active.process.poll()
        if state.pid != active.process.pid:  # a forked run has no pid when it starts
            state.pid = active.process.pid
            self._save()
        if code is not None:
            self._end(active, code, num_waiting=num_waiting)

    def _end(self, active: _ActiveRun, code: int, *, num_waiting: int) -> None:
        self._active.remove(active)
        state = self.states[active.run.name]
        record = read_run_record(active.run.record)
        if active.slot is not None and str(record.get("updated", "~")) < (state.started or ""):
            record = {}  # an earlier attempt's: this one ended before its first step
        is_ours = active.slot is not None
        state.exit_code = code if is_ours else None
        state.status = status_at_end(
            state.exit_code, record.get("status"), was_stopped=active.is_interrupted
        )
        state.pid = None
        state.seconds = time.monotonic() - active.begin if is_ours else wall_seconds(record)
        if state.status == "failed":
            ending = f"exit code {code}" if code else "exit code 0, but its record is not finished"
            log = self.job(active.run).log
            state.error = str(record.get("error") or "") or last_error(log) or ending
        elif state.status == "finished":
            self._finished_seconds.append(state.seconds)
        self._save()
        self.echo(self._end_line(active.run, record, num_waiting))
        if state.status == "finished":
            self.on_finished(active.run)

    def _end_line(self, run: PlannedRun, record: Mapping[str, Any], num_waiting: int) -> str:
        state = self.states[run.name]
        num_failed = self.statuses.count("failed")
        num_left = num_waiting + len(self._active)
        text = f"[{self.statuses.count('finished')}/{len(self.runs)}] {run.name}: {state.status}"
        text += f" in {duration(state.seconds)}"
        loss = target_loss(record)
        if state.status == "finished" and loss is not None:
            text += f", target loss {loss:.4g}"
        if state.status == "failed":
            text += f": {state.error}; see {self.job(run).log}"
        if num_failed:
            text += f"; {num_failed} failed"
        if num_left and self.caught is None:
            text += f"; {num_left} to go{self._time_left(num_left)}"
        return text

    def _time_left(self, num_left: int) -> str:
        if not self._finished_seconds:
            return ""
        mean = fmean(self._finished_seconds)
        begins = [active.begin for active in self._active if active.slot is not None]
        under_way = sum(min(mean, time.monotonic() - begin) for begin in begins)
        parallel = min(len(self.slots), num_left)
        return f", about {duration(max(0.0, num_left * mean - under_way) / parallel)} left"

    def _save(self) -> None:
        write_state(self.folder / "state.json", self.name, self.states)

    def _receive(self, number: int, _: object) -> None:
        """Note a signal: the first one ends the runs in an orderly way, a second one kills them."""
        self.caught = self.caught or number
        self._num_signals += 1

    def _stop(self, launcher: Launcher) -> None:
        if self._deadline is None:
            self._deadline = time.monotonic() + GRACE_SECONDS
            self.echo(
                f"{signal.Signals(self.caught or 0).name}: ending {len(self._active)} runs; "
                "the same command continues from here"
            )
        launcher.cancel()
        for active in self._active:
            if not active.is_interrupted and active.process.pid is not None:
                active.process.interrupt()
                active.is_interrupted = True
            elif self._num_signals > 1 or time.monotonic() > self._deadline:
                active.process.kill()


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return True
