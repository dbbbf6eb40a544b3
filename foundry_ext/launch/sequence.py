"""Several YAML files, one after another, each in a process of its own.

A fresh process, so that no run inherits another's device memory, process group or random state.
A run that fails does not stop the next; a summary closes the sequence.
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

from foundry_ext.utils.processes import RANK_VARIABLES


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one file of the sequence ended."""

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
    """Runs commands and passes SIGINT and SIGTERM on to the one that runs.

    The child gets a session of its own: a terminal's Ctrl-C reaches it once, through here. A
    launcher knows Ctrl-C alone and takes a second one as the order to kill, so it is sent SIGINT
    for either signal, and only once; it then stops its ranks with SIGTERM and waits for them.
    """

    def __init__(self, *, is_launcher: bool) -> None:
        self.is_launcher = is_launcher
        self.caught: int | None = None
        """The first signal received."""
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "ChildRunner":
        signals = (signal.SIGINT, signal.SIGTERM)
        self._previous = {number: signal.signal(number, self._receive) for number in signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def run(self, command: Sequence[str]) -> int:
        environment = dict(os.environ)
        if self.is_launcher:
            for name in RANK_VARIABLES:
                environment.pop(name, None)
        self._child = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True
        )
        if self.caught is not None:  # it came while the child was being started
            self._forward(self.caught)
        code = self._child.wait()
        self._child = None
        return code

    def _receive(self, number: int, _: FrameType | None) -> None:
        is_first = self.caught is None
        self.caught = self.caught or number
        if is_first or not self.is_launcher:
            self._forward(number)

    def _forward(self, number: int) -> None:
        if self._child is not None:
            self._child.send_signal(signal.SIGINT if self.is_launcher else number)


def train_in_turn(script: str, files: Sequence[Path], overrides: Sequence[str]) -> int:
    """Train each file; 0 only if every one ended with 0.

    Among several ranks, local rank 0 starts a launcher for each file and the others leave at once:
    were each rank to start its own child, a run failing on one rank would keep the others waiting.
    """
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return 0
    outcomes: list[Outcome] = []
    with ChildRunner(is_launcher=local_ranks > 1) as runner:
        for number, path in enumerate(files, start=1):
            if runner.caught is not None:
                outcomes.append(Outcome(path=path, exit_code=None, seconds=0))
                continue
            print(f"train.py: run {number} of {len(files)}: {path}", flush=True)
            start = time.monotonic()
            code = runner.run(child_command(script, path, overrides, local_ranks))
            outcomes.append(Outcome(path=path, exit_code=code, seconds=time.monotonic() - start))

    num_ok = sum(outcome.exit_code == 0 for outcome in outcomes)
    print(f"train.py: {num_ok} of {len(files)} runs succeeded")
    print(*outcomes, sep="\n", flush=True)
    if num_ok == len(files):
        return 0
    return 1 if runner.caught is None else 128 + runner.caught


def child_command(script: str, path: Path, overrides: Sequence[str], local_ranks: int) -> list[str]:
    launcher = ["-m", "composer.cli.launcher", "-n", str(local_ranks)] if local_ranks > 1 else []
    return [sys.executable, *launcher, script, str(path), *overrides]
