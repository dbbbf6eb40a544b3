"""SIGTERM (pre-emption) and Ctrl-C, held back until a batch has ended on every rank."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
from composer.core import State
from composer.utils import dist

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ECHO_SECONDS = 5.0


class StopSignals:
    """Handlers that hold back the first SIGINT and the first SIGTERM.

    A second signal of the same kind ends the process as without these handlers. It must be of the
    same kind because a terminal sends Ctrl-C to Composer's launcher and to its ranks, and the
    launcher then sends its ranks SIGTERM. A machine that shuts down and a cluster's scheduler send
    SIGTERM to all processes, and the launcher passes it on, so another SIGTERM within 5 seconds
    is taken for the first one.
    """

    def __init__(self):
        self.received: list[int] = []
        self._times: dict[int, float] = {}
        self._previous: dict[int, Any] = {}
        self._pid = os.getpid()

    def install(self) -> None:
        """Install the handlers; outside the main thread, where Python allows none, do nothing."""
        if threading.current_thread() is threading.main_thread() and not self._previous:
            self._previous = {kind: signal.signal(kind, self._receive) for kind in SIGNALS}

    def remove(self) -> None:
        """Put the previous handlers back."""
        if os.getpid() == self._pid:
            for kind, handler in self._previous.items():
                signal.signal(kind, handler)
        self._previous = {}

    def _receive(self, kind: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        is_second = kind in self.received
        if is_second and kind == signal.SIGTERM and now - self._times[kind] < ECHO_SECONDS:
            return
        self._times.setdefault(kind, now)
        self.received.append(kind)
        if os.getpid() != self._pid:  # a forked worker of the loader, which ends with its rank
            return
        if is_second:
            previous = self._previous.get(kind)
            self.remove()
            if callable(previous):
                previous(kind, frame)
            else:
                os.kill(self._pid, kind)
        elif len(self.received) == 1 and os.environ.get("RANK", "0") == "0":
            # Not by print, which the signal may have interrupted: it is not reentrant.
            name = signal.Signals(kind).name
            later = f" after {ECHO_SECONDS:g} seconds" if kind == signal.SIGTERM else ""
            text = f"{name}: saving at the end of this batch; send it again{later} to end at once\n"
            os.write(2, text.encode())

    def agreed(self, state: State) -> int:
        """Return the number of a signal that some rank received, or 0. A collective."""
        received = self.received[0] if self.received else 0
        if dist.get_world_size() == 1:
            return received
        highest = state.device.tensor_to_device(torch.tensor([received]))
        dist.all_reduce(highest, reduce_operation="MAX")
        return int(highest.item())
