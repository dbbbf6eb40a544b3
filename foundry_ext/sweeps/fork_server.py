"""Imports torch, Composer and llm-foundry once, then forks a child for every run it is told of.

    python -m foundry_ext.sweeps.fork_server        (started by sweeps.launchers, on a CPU)

On standard input a line a run, {"program", "arguments", "log", "lock", "environment"}; on standard
output {"pid"} for each in turn, and {"pid", "code"} when it ended. A child that is forked after
torch has computed in several threads hangs, so this process imports and does nothing else.

Its end of input is its own end. Children go on: they hold their locks, and a restarted sweep waits.
"""

import gc
import importlib
import json
import os
import runpy
import select
import signal
import sys
from pathlib import Path
from typing import Any

IMPORTS = (
    "composer",
    "llmfoundry.command_utils",
    "peft",
    "foundry_ext.launch.train",
    "foundry_ext.training.model",
    "foundry_ext.data.dataloader",
)
_POLL_SECONDS = 0.1


def main() -> int:
    """The exit code of the server, or that of a child's program."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # imports may print
    import_all()
    job = serve(replies)
    if job is None:
        return 0
    replies.close()
    return run(job)


def import_all() -> None:
    """What every run would import, here once."""
    for name in IMPORTS:
        importlib.import_module(name)
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    # Composer asks for every causal model that transformers has: five seconds of importing.
    list(MODEL_FOR_CAUSAL_LM_MAPPING.values())
    gc.freeze()  # children then need not look through all of it for garbage


def serve(replies: Any) -> dict[str, Any] | None:
    """None when there is nothing more to do; in a child, what the child has to run."""
    pending = b""
    while True:
        readable, _, _ = select.select([0], [], [], _POLL_SECONDS)
        if readable:
            received = os.read(0, 65536)
            if not received:
                return None
            *lines, pending = (pending + received).split(b"\n")
            for line in lines:
                job = json.loads(line)
                pid = _fork(job)
                if pid == 0:
                    return job
                print(json.dumps({"pid": pid}), file=replies)
        for pid, code in _ended():
            print(json.dumps({"pid": pid, "code": code}), file=replies)


def _fork(job: dict[str, Any]) -> int:
    """os.fork(), the child holding the run's lock from before it exists."""
    # Imported here: fcntl is not everywhere.
    from foundry_ext.sweeps.state import claim

    lock = claim(Path(job["lock"]))
    if lock is None:
        raise BlockingIOError(f"{job['lock']}: another process runs this one")
    pid = os.fork()
    if pid:
        os.close(lock)  # the child's copy keeps it
    return pid


def _ended() -> list[tuple[int, int]]:
    found = []
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        found.append((pid, os.waitstatus_to_exitcode(status)))


def run(job: dict[str, Any]) -> int:
    """The program as `python program arguments` would run it; its exit code."""
    os.setsid()  # a terminal's Ctrl-C goes to the sweep, which passes it on
    sweep_lock = os.environ.pop("FOUNDRY_EXT_SWEEP_LOCK", None)
    if sweep_lock:
        os.close(int(sweep_lock))
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    sys.stdout.reconfigure(line_buffering=True)  # pyright: ignore[reportAttributeAccessIssue]
    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, handler)
    os.environ.update(job["environment"])
    sys.argv = [job["program"], *job["arguments"]]
    sys.path[0] = str(Path(job["program"]).resolve().parent)
    runpy.run_path(job["program"], run_name="__main__")  # SystemExit, if any, goes on from here
    return 0


if __name__ == "__main__":
    sys.exit(main())
