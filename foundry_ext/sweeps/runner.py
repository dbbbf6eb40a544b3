"""Runs a sweep: some runs at a time, each exactly once, whatever happens in between.

What is finished is known from the runs' records, what failed or was stopped from the sweep's own
state, and what a killed sweep left running from the runs' locks (state.py).
"""

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foundry_ext.config.loading import UsageError
from foundry_ext.sweeps.launchers import Job, Launcher, Orphan, Process
from foundry_ext.sweeps.plan import Outcome, PlannedRun, finished_otherwise
from foundry_ext.sweeps.state import (
    RunState,
    claim,
    is_started_again,
    now,
    read_outcome,
    read_state,
    status_at_end,
    status_now,
    write_state,
)
from foundry_ext.sweeps.text import duration, target_loss, wall_seconds

FOLDER = Path("outputs/sweeps")
POLL_SECONDS = 0.2
GRACE_SECONDS = 60.0
"""For a run to write what it has after Ctrl-C, before it is killed."""
_LOCK_WAIT_SECONDS = 120.0


@dataclass(kw_only=True)
class _Active:
    run: PlannedRun
    process: Process
    slot: int | None
    """None: of an earlier sweep."""
    begin: float
    is_interrupted: bool = False


class SweepRunner:
    """The runs of one sweep and the files that remember them.

    Args:
        slots: the environment of each run that may be under way at once.
        say: prints one line.
    """

    def __init__(
        self,
        name: str,
        runs: Sequence[PlannedRun],
        *,
        slots: Sequence[Mapping[str, str]],
        retry_failed: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        self.name, self.runs, self.slots, self.say = name, list(runs), list(slots), say
        self.retry_failed = retry_failed
        self.folder = FOLDER / name
        self.states: dict[str, RunState] = {}
        self.caught: int | None = None
        """The first signal received."""
        self._num_signals = 0
        self._active: list[_Active] = []
        self._finished_seconds: list[float] = []

    # --- before the first run --------------------------------------------------------------------

    @contextmanager
    def locked(self) -> Iterator[int]:
        """The sweep's lock, held; ValueError where another process runs this sweep."""
        path = self.folder / "lock"
        deadline = time.monotonic() + _LOCK_WAIT_SECONDS
        lock = claim(path)
        while lock is None:
            holder = path.read_text().strip()
            if _is_alive(holder) or time.monotonic() > deadline:
                raise UsageError(
                    f"sweep {self.name} is running already, as process {holder or 'unknown'}; "
                    f"wait for it or stop it (its lock is {path})"
                )
            time.sleep(POLL_SECONDS)  # what a killed sweep started is about to see that
            lock = claim(path)
        try:
            os.ftruncate(lock, 0)
            os.pwrite(lock, str(os.getpid()).encode(), 0)
            yield lock
        finally:
            os.close(lock)

    def look(self) -> list[PlannedRun]:
        """Reads state and records, and returns what is to be started."""
        known = read_state(self.folder / "state.json")
        # Runs of an earlier version of the sweep file stay in the state.
        self.states = {**known, **{run.name: known.get(run.name, RunState()) for run in self.runs}}
        waiting = []
        for run in self.runs:
            state = self.states[run.name]
            record = read_outcome(run.record)
            if record.get("status") == "finished":
                difference = finished_otherwise(run, record)
                if difference:
                    raise UsageError(
                        f"{run.record} is of a finished run with {difference}; move it away, or "
                        "give the YAML another run_name"
                    )
            orphan = Orphan(self.job(run), state.pid)
            if orphan.is_running:
                state.status = "running"
                self._active.append(
                    _Active(run=run, process=orphan, slot=None, begin=time.monotonic())
                )
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
            environment={**(slot or {}), "FOUNDRY_EXT_SWEEP": self.name},
        )

    # --- the runs --------------------------------------------------------------------------------

    def run(self, waiting: Sequence[PlannedRun], launcher: Launcher) -> list[Outcome]:
        """Starts all that wait, and returns when nothing runs any more."""
        queue = list(waiting)
        for folder in ("logs", "locks"):
            (self.folder / folder).mkdir(parents=True, exist_ok=True)
        self._save()
        for active in self._active:
            self.say(f"{active.run.name}: still running since an earlier sweep; waiting for it")
        with self._signals():
            try:
                while self._active or (queue and self.caught is None):
                    while queue and self.caught is None and (slot := self._free_slot()) is not None:
                        self._start(queue.pop(0), slot, launcher)
                    for active in list(self._active):
                        code = active.process.poll()
                        self.states[active.run.name].pid = active.process.pid
                        if code is not None:
                            self._end(active, code, num_waiting=len(queue))
                    if self.caught is not None:
                        self._stop(launcher)
                    if self._active:
                        time.sleep(POLL_SECONDS)
            finally:
                self._save()
                launcher.close()
        return self.outcomes()

    def outcomes(self) -> list[Outcome]:
        found = []
        for run in self.runs:
            state = self.states[run.name]
            found.append(
                Outcome(
                    name=run.name,
                    status=state.status,
                    exit_code=state.exit_code,
                    seconds=state.seconds,
                    record=run.record,
                    log=self.job(run).log,
                )
            )
        return found

    def _free_slot(self) -> int | None:
        taken = [active.slot for active in self._active]
        # A run left over from an earlier sweep computes too, on a device nobody knows.
        free = [slot for slot in range(len(self.slots)) if slot not in taken]
        return free[0] if len(self._active) < len(self.slots) else None

    def _start(self, run: PlannedRun, slot: int, launcher: Launcher) -> None:
        state = self.states[run.name]
        state.status, state.started, state.exit_code, state.error = "running", now(), None, None
        state.attempts += 1
        self._save()  # before the process is there: a restart finds it by its lock
        job = self.job(run, self.slots[slot])
        with job.log.open("a") as log:
            print(f"--- attempt {state.attempts}, {state.started}", file=log)
        process = launcher.start(job)
        state.pid = process.pid
        self._active.append(_Active(run=run, process=process, slot=slot, begin=time.monotonic()))
        self._save()
        self.say(f"{run.name}: started")

    def _end(self, active: _Active, code: int, *, num_waiting: int) -> None:
        self._active.remove(active)
        state = self.states[active.run.name]
        record = read_outcome(active.run.record)
        is_ours = active.slot is not None
        state.exit_code = code if is_ours else None
        state.status = status_at_end(
            state.exit_code, record.get("status"), was_stopped=active.is_interrupted
        )
        state.pid = None
        state.seconds = time.monotonic() - active.begin if is_ours else wall_seconds(record)
        if state.status == "failed":
            state.error = record.get("error") or (
                f"exit code {code}" if code else "exit code 0, but its record is not finished"
            )
        elif state.status == "finished":
            self._finished_seconds.append(state.seconds)
        self._save()
        self.say(self._end_line(active.run, record, num_waiting))

    def _end_line(self, run: PlannedRun, record: Mapping[str, Any], num_waiting: int) -> str:
        state = self.states[run.name]
        counts = [self.states[one.name].status for one in self.runs]
        num_left = num_waiting + len(self._active)
        text = f"[{counts.count('finished')}/{len(counts)}] {run.name}: {state.status}"
        text += f" in {duration(state.seconds)}"
        loss = target_loss(record)
        if state.status == "finished" and loss is not None:
            text += f", target loss {loss:.4g}"
        if state.status == "failed":
            text += f": {state.error}; see {self.job(run).log}"
        if counts.count("failed"):
            text += f"; {counts.count('failed')} failed"
        if num_left and self.caught is None:
            text += f"; {num_left} to go{self._time_left(num_left)}"
        return text

    def _time_left(self, num_left: int) -> str:
        if not self._finished_seconds:
            return ""
        mean = sum(self._finished_seconds) / len(self._finished_seconds)
        under_way = sum(
            min(mean, time.monotonic() - active.begin)
            for active in self._active
            if active.slot is not None
        )
        parallel = min(len(self.slots), num_left)
        return f", about {duration(max(0.0, num_left * mean - under_way) / parallel)} left"

    def _save(self) -> None:
        write_state(self.folder / "state.json", self.name, self.states)

    # --- Ctrl-C ----------------------------------------------------------------------------------

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the runs and leave a state that resumes; a second one kills."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._receive) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, _: object) -> None:
        if self.caught is None:
            self._deadline = time.monotonic() + GRACE_SECONDS
        self.caught = self.caught or number
        self._num_signals += 1

    def _stop(self, launcher: Launcher) -> None:
        if not any(active.is_interrupted for active in self._active) and self._active:
            self.say(
                f"{signal.Signals(self.caught or 0).name}: ending {len(self._active)} runs; "
                "the same command goes on from here"
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
