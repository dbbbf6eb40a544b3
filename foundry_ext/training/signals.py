"""SIGTERM (pre-emption) and Ctrl-C, remembered until a batch has ended on every rank."""

import os
import signal
import threading
from types import FrameType
from typing import Any

import torch
from composer.core import State
from composer.utils import dist

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Holds back the first of each signal; the second one of a kind ends the process as it did.

    Of a kind, for Composer's launcher answers a terminal's Ctrl-C, which its ranks have too, by
    sending them SIGTERM.
    """

    def __init__(self):
        self.received: list[int] = []
        self._previous: dict[int, Any] = {}
        self._pid = os.getpid()

    def install(self) -> None:
        """Nothing where Python allows no handlers, outside the main thread."""
        if threading.current_thread() is threading.main_thread() and not self._previous:
            self._previous = {one: signal.signal(one, self._receive) for one in SIGNALS}

    def remove(self) -> None:
        if os.getpid() == self._pid:
            for number, handler in self._previous.items():
                signal.signal(number, handler)
        self._previous = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        is_second = number in self.received
        self.received.append(number)
        if os.getpid() != self._pid:  # a worker of the loader, which ends with its rank
            return
        if is_second:
            previous = self._previous.get(number)
            self.remove()
            if callable(previous):
                previous(number, frame)
            else:
                os.kill(self._pid, number)
        elif len(self.received) == 1 and os.environ.get("RANK", "0") == "0":
            # Not print: the signal may have come inside one.
            name = signal.Signals(number).name
            text = f"{name}: saving at this batch's end; once more ends the run at once\n"
            os.write(2, text.encode())

    def agreed(self, state: State) -> int:
        """The number of a signal that some rank received, or 0; to be called by all at once."""
        found = self.received[0] if self.received else 0
        if dist.get_world_size() == 1:
            return found
        number = state.device.tensor_to_device(torch.tensor([found]))
        dist.all_reduce(number, reduce_operation="MAX")
        return int(number.item())
