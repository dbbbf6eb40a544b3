"""Runs several YAML files one after another, each in its own process.

A fresh process inherits no device memory, process group or random state from the run before. A
failed run does not stop the next one; a summary ends the sequence.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from foundry_ext.utils.processes import environment_without_rank, handling_signals


@dataclass(frozen=True, kw_only=True)
class SequenceResult:
    """The end of one run of the sequence."""

    path: Path
    exit_code: int | None
    """None: not started. Negative: killed by that signal."""
    seconds: float

    def __str__(self) -> str:
        if self.exit_code is None:
            state = "not started"
        elif self.exit_code < 0:
            state = f"killed by {signal.Signals(-self.exit_code).name}"
        else:
            state = f"exit code {self.exit_code}" if self.exit_code else "ok"
        return f"  {state:<18} {self.seconds:6.0f} s  {self.path}"


class ChildRunner:
    """A runner of commands that forwards SIGINT and SIGTERM to the current one.

    The child gets its own session, so a terminal's Ctrl-C reaches it once, through here. Composer's
    launcher kills its ranks at a second signal. It is therefore sent a single SIGINT for either
    signal; it then stops its ranks with SIGTERM and waits for them.
    """

    def __init__(self, *, is_launcher: bool) -> None:
        self.is_launcher = is_launcher
        self.caught: int | None = None
        """The first signal received."""
        self._child: subprocess.Popen[bytes] | None = None

    def run(self, command: Sequence[str]) -> int:
        """Run the command and return its exit code, negative for a signal."""
        environment = environment_without_rank() if self.is_launcher else None
        self._child = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True
        )
        if self.caught is not None:  # the signal came while the child was starting
            self._forward(self.caught)
        code = self._child.wait()
        self._child = None
        return code

    def receive(self, number: int, _: FrameType | None) -> None:
        is_first = self.caught is None
        self.caught = self.caught or number
        if is_first or not self.is_launcher:
            self._forward(number)

    def _forward(self, number: int) -> None:
        if self._child is not None:
            self._child.send_signal(signal.SIGINT if self.is_launcher else number)


def train_in_turn(script: str, files: Sequence[Path], overrides: Sequence[str]) -> int:
    """Train each file; return 0 only if every run returned 0.

    With several ranks, local rank 0 starts a launcher per file and the other ranks return at once.
    If each rank started its own child, a run that fails on one rank would keep the others waiting.
    """
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return 0
    results: list[SequenceResult] = []
    runner = ChildRunner(is_launcher=local_ranks > 1)
    with handling_signals(runner.receive):
        for number, path in enumerate(files, start=1):
            if runner.caught is not None:
                results.append(SequenceResult(path=path, exit_code=None, seconds=0))
                continue
            print(f"train.py: run {number} of {len(files)}: {path}", flush=True)
            start = time.monotonic()
            code = runner.run(child_command(script, path, overrides, local_ranks))
            results.append(
                SequenceResult(path=path, exit_code=code, seconds=time.monotonic() - start)
            )

    num_ok = sum(result.exit_code == 0 for result in results)
    print(f"train.py: {num_ok} of {len(files)} runs succeeded")
    print(*results, sep="\n", flush=True)
    if num_ok == len(files):
        return 0
    return 1 if runner.caught is None else 128 + runner.caught


def child_command(script: str, path: Path, overrides: Sequence[str], local_ranks: int) -> list[str]:
    """Return the command that trains one file, with a launcher for several ranks."""
    launcher = ["-m", "composer.cli.launcher", "-n", str(local_ranks)] if local_ranks > 1 else []
    return [sys.executable, *launcher, script, str(path), *overrides]
