"""Calls that nobody waits for: a thread of their own makes them, one after another."""

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

MOST_CALLS = 1000  # that wait; a step that finds so many waits for room


class _Call(NamedTuple):
    name: str
    make: Callable[[], object]
    limit: float
    """Seconds that it may take."""


class Background:
    """Makes calls in their order, in a daemon thread, and gives up those that take too long.

    Python cannot end a thread. The thread of a call that was given up is left behind; another one
    makes the calls after it. `submit` and `drain` notice such a call, so there is no third thread.

    Args:
        limit: seconds that a call may take.
        give_up: is told the name of a call that took longer.
    """

    def __init__(self, limit: float, give_up: Callable[[str], None]):
        self._limit, self._give_up = limit, give_up
        self._calls: deque[_Call] = deque()
        self._running: _Call | None = None
        self._end = math.inf  # of the running call's time
        self._changed = threading.Condition()
        self._left: list[threading.Thread] = []
        self._thread: threading.Thread | None = None
        self._start()

    @property
    def is_stuck(self) -> bool:
        """Whether the thread of a call that was given up still waits."""
        self._left = [thread for thread in self._left if thread.is_alive()]
        return bool(self._left)

    @property
    def is_in_charge(self) -> bool:
        """Whether this thread makes the calls: it does not after its call was given up."""
        return threading.current_thread() is self._thread

    def submit(self, name: str, make: Callable[[], object], *, limit: float | None = None) -> None:
        """Make the call, which must not raise, soon. With too many calls waiting, wait for room."""
        with self._changed:
            self._check()
            while len(self._calls) >= MOST_CALLS:
                self._changed.wait(0.1)
                self._check()
            self._calls.append(_Call(name, make, self._limit if limit is None else limit))
            self._changed.notify_all()

    def drain(self, seconds: float) -> bool:
        """Wait until every call was made; return False if that takes longer than `seconds`."""
        end = time.monotonic() + seconds
        with self._changed:
            while self._calls or self._running:
                if time.monotonic() >= end:
                    return False
                self._changed.wait(0.1)
                self._check()
        return True

    def close(self) -> None:
        """Forget the calls that wait, and end the thread."""
        with self._changed:
            self._calls.clear()
            self._thread = None
            self._changed.notify_all()

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._work, name="logger", daemon=True)
        self._thread.start()

    def _check(self) -> None:
        """Give up a call that has taken too long."""
        if self._running is None or time.monotonic() < self._end:
            return
        name, self._running = self._running.name, None
        if self._thread is not None:
            self._left.append(self._thread)
        self._start()
        self._give_up(name)

    def _work(self) -> None:
        me = threading.current_thread()
        while True:
            with self._changed:
                while self._thread is me and not self._calls:
                    self._changed.wait()
                if self._thread is not me:
                    return
                self._running = self._calls.popleft()
                self._end = time.monotonic() + self._running.limit
                self._changed.notify_all()
                make = self._running.make
            make()
            with self._changed:
                if self._thread is me:
                    self._running = None
                    self._changed.notify_all()
