"""Composer's WandBLogger made harmless: W&B neither ends a run nor delays its steps.

Python's part of W&B sends everything to a service process, which writes the run's file and talks to
the server. Either may fail: the kernel kills the service when memory is short, a server stops
answering. The calls are therefore made in a thread, with a limit each, and their errors become
warnings that say what W&B lacks and where else the run's numbers are.
"""

import atexit
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

from composer.core import State
from composer.loggers import ConsoleLogger, Logger, WandBLogger

from foundry_ext.training.loggers.background import Background
from foundry_ext.training.loggers.metrics_file import MetricsFile
from foundry_ext.training.loggers.wandb_service import (
    end_service,
    has_ended,
    lacks_key,
    leave,
    service_process,
    write_out,
)
from foundry_ext.utils.errors import one_line
from foundry_ext.utils.output import redacted_arguments

log = logging.getLogger(__name__)

CALL_SECONDS = 30.0
"""Time that W&B has for one call. Training goes on meanwhile."""
CLOSE_SECONDS = 120.0
"""Time that W&B has at the end of a run to send what it has."""
RESTARTS = 3  # of W&B's service in one run
_LAST_SECONDS = 10.0  # for calls to notice that W&B's service is gone


class BackgroundWandB(WandBLogger):
    """WandBLogger whose subclass passes its calls to `send`.

    A call that takes CALL_SECONDS is given up. If W&B's service has died, another one is started,
    with another run of W&B's. The end of a run waits CLOSE_SECONDS at most.
    """

    _background: Background | None = None
    _service: "subprocess.Popen[bytes] | None" = None
    """W&B's service; None if another process has started it."""
    _folder: Path | None = None
    """The run's folder, wandb/run-... or wandb/offline-run-..., which `wandb sync` uploads."""

    def describe(self) -> None:
        """Tell a new run of W&B's its axes and configuration."""

    def save_files(self) -> None:
        """Save the run's files at its end."""

    def connect(self, state: State, logger: Logger) -> None:
        """Start W&B, and from now on make its calls in the background."""
        self._num_lost, self._last_lost, self._restarts = 0, "", 0
        self._elsewhere = _other_places(state, logger)
        with redacted_arguments():
            self._start(state, logger)
        if self._enabled:
            self._background = Background(CALL_SECONDS, self._give_up)
            self.send("the axes of its charts", self._started)
            # If a run fails, W&B's exit hook closes it before Composer's calls `close`. This hook
            # comes before both, because exit hooks run last to first.
            atexit.register(self._at_exit)

    def _start(self, state: State, logger: Logger) -> None:
        """Start W&B: without a key, network or service offline, and if that fails not at all."""
        try:
            if self._enabled and lacks_key(self._init_kwargs):
                raise ConnectionError("there is no key")  # W&B would ask a terminal, and wait
            super().init(state, logger)
        except Exception as error:  # also OSError, and classes of W&B's that are no wandb.Error
            log.warning(
                "W&B cannot be reached (%s): this run continues offline, and `wandb sync %s`"
                " uploads it later; `wandb login` stores a key, WANDB_MODE=offline avoids the wait",
                *(_short(error), "wandb/offline-run-*"),
            )
            self._init_kwargs["mode"] = "offline"
            # A service that another process has started, and that may be gone.
            os.environ.pop("WANDB_SERVICE", None)
            leave(1)
            try:
                super().init(state, logger)
            except Exception as error:
                log.warning(
                    "W&B cannot start (%s): this run is not in W&B; its numbers are in %s",
                    *(_short(error), self._elsewhere),
                )
                self._init_kwargs["mode"] = "disabled"
                super().init(state, logger)

    def _started(self) -> None:
        import wandb

        assert wandb.run is not None
        self._service = service_process()
        self._folder = None if wandb.run.disabled else Path(wandb.run.dir).parent
        self.describe()

    def send(self, what: str, call: Callable[[], None], *, asks_server: bool = False) -> None:
        """Make a call soon; before `connect`, at once.

        A call that asks the server is dropped while the server owes an answer to an earlier one.
        """
        if not self._enabled:
            return
        if self._background is None:
            call()
        elif asks_server and self._background.is_stuck:  # another thread would be left behind
            self._lose(what, "the server has not answered an earlier call")
        else:
            self._background.submit(what, partial(self._attempt, what, call))

    def _attempt(self, what: str, call: Callable[[], None]) -> None:
        """Make a call, a second time if W&B's service had to be started again."""
        reason = ""
        for _ in range(2):
            try:
                if self._service is not None and self._service.poll() is not None:
                    raise ConnectionError("its service is gone")
                call()
                return
            except BaseException as error:  # W&B calls sys.exit, too
                reason = f"{type(error).__name__}: {error}"
            if self._background is None or not self._background.is_in_charge:
                return  # given up meanwhile
            if not self._restart(reason):
                break
        self._lose(what, reason)

    def _give_up(self, what: str) -> None:
        self._lose(what, f"no answer in {CALL_SECONDS:g} s")

    def _lose(self, what: str, reason: str) -> None:
        """Say what W&B lacks: the first time at once, the rest at the end of the run."""
        self._num_lost += 1
        self._last_lost = what
        if self._num_lost == 1:
            log.warning(
                "W&B lacks %s (%s); the run goes on, and its numbers are in %s",
                *(what, _short(reason), self._elsewhere),
            )

    def _restart(self, reason: str) -> bool:
        """Start another service, with another run, if W&B's has died; return whether it runs."""
        import wandb
        from wandb.util import generate_id

        if not has_ended(self._service) or self._restarts == RESTARTS:
            return False
        self._restarts += 1
        leave(1)
        kwargs: dict[str, Any] = {**self._init_kwargs, "id": generate_id()}
        kwargs["settings"] = {**kwargs["settings"], "init_timeout": CALL_SECONDS / 2}
        try:
            with redacted_arguments():
                try:
                    wandb.init(**kwargs)
                except Exception:
                    wandb.init(**{**kwargs, "mode": "offline"})
            self._started()
        except Exception as error:
            log.warning("W&B's service cannot be started again (%s)", _short(error))
            return False
        log.warning(
            "W&B's service died (%s): W&B goes on with another run of the same name and group, %s,"
            " and may lack the values just before; the run's numbers are in %s",
            *(_short(reason), self._folder, self._elsewhere),
        )
        return True

    # --- the end of the run ----------------------------------------------------------------------

    def post_close(self) -> None:
        if self._background is None:
            super().post_close()
        elif not self._is_in_atexit:  # else W&B's own exit hook has closed it
            atexit.unregister(self._at_exit)
            code = int(sys.exc_info()[0] is not None)
            self._background.submit("its end", partial(self._finish, code), limit=math.inf)
            self._end_of_calls(self._background.drain(CLOSE_SECONDS))

    def _finish(self, exit_code: int) -> None:
        self._attempt("the run's files", self.save_files)
        if not leave(exit_code):
            self._lose("the end of the run", "W&B failed")

    def _at_exit(self) -> None:
        """Save the record, and bound the time that W&B's own exit hook then waits."""
        assert self._background is not None
        self.send("the run's files", self.save_files)
        sent = self._background.drain(CLOSE_SECONDS)
        if sent and self._service is not None and self._service.poll() is None:
            self._background.submit("its end", self._watch_service, limit=math.inf)
        else:
            self._end_of_calls(sent)

    def _watch_service(self) -> None:
        assert self._service is not None
        try:
            self._service.wait(timeout=CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._stop_service()

    def _end_of_calls(self, all_made: bool) -> None:
        assert self._background is not None
        if not all_made:
            self._stop_service()
            self._background.drain(_LAST_SECONDS)
        end_service(1)  # if it has not ended; W&B's exit hook would wait for it, or fail
        self._background.close()
        if self._num_lost > 1:
            log.warning(
                "W&B lacks %d values, tables and files, up to %s; `wandb sync %s` uploads what the"
                " folder has",
                *(self._num_lost, self._last_lost, self._folder),
            )

    def _stop_service(self) -> None:
        log.warning(
            "W&B has not sent everything %.0f s after the end of the run; `wandb sync %s` sends the"
            " rest",
            *(CLOSE_SECONDS, self._folder),
        )
        self._restarts = RESTARTS  # a call that waits for the service must not start another one
        if self._service is not None:
            write_out()
            self._service.kill()


def _other_places(state: State, logger: Logger) -> str:
    """Return where else the run's numbers are, as `the console and outputs/run/metrics.jsonl`."""
    places = []
    for destination in logger.destinations:
        if isinstance(destination, ConsoleLogger):
            places.append("the console")
        elif isinstance(destination, MetricsFile):
            places.append(destination.path.replace("{run_name}", state.run_name))
    return " and ".join(places) or "no other logger; metrics_file would keep them"


def _short(text: object) -> str:
    return shorten(one_line(text), 200, placeholder=" ...")
