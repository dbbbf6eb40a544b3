"""Server that starts one run repeatedly and kills it: main(FOLDER), in a preloaded process.

FOLDER/job.json has the world, the run's settings for kit.run_config, and the kills. A number kills
the run so many seconds after it began to train, "save" while it writes a checkpoint, and "start" at
some moment before the first step. Runs are forked from this process, which has everything imported,
so that a start costs a second. After the last kill the run continues to its end. FOLDER/result.json
has the number of attempts, and how many died inside a save or while starting.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback
from llmfoundry import registry

from tests.training import kit

PATIENCE = 120  # seconds


class Diary(Callback):
    """Callback that appends every batch to `path`: its number and digests of its documents."""

    def __init__(self, path: str):
        self.path = path

    def batch_start(self, state, logger):
        documents = [
            hashlib.sha256(repr((ids.tolist(), labels.tolist())).encode()).hexdigest()[:16]
            for ids, labels in kit.documents_of(state.batch)
        ]
        line = {"batch": state.timestamp.batch.value, "documents": documents}
        with open(self.path, "a") as file:
            file.write("\n" + json.dumps(line) + "\n")  # complete, even after a cut one


registry.callbacks.register("diary", func=Diary)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    job = json.loads((folder / "job.json").read_text())
    world = kit.World(**{key: Path(path) for key, path in job["world"].items()})
    moments = random.Random(job["seed"])
    met: dict[str, Any] = {"attempts": 0, "inside_a_save": 0, "while_starting": 0}
    for kill in [*job["kills"], None]:
        before = read_progress(folder)
        pid = start(world, folder, job["settings"])
        met["attempts"] += 1
        ended = wait_for(folder, pid, kill, before, moments)
        if ended is not None:
            if kill is None or ended != 0:
                finish(folder, met, ended)
            continue  # it came to its end before it was killed: again from there
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        met["inside_a_save"] += any((folder / "checkpoints").glob("partial-ep*"))
        met["while_starting"] += read_progress(folder) == before
    raise AssertionError("not reached")


def start(world: kit.World, folder: Path, settings: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        os.setpgid(pid, pid)
        return pid
    os.setpgid(0, 0)
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        run = kit.run(kit.run_config(world, folder, **settings))
        torch.save(run.weights, folder / "weights.pt")
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait_for(folder: Path, pid: int, kill: Any, before: int, moments: random.Random) -> int | None:
    """Wait for the moment to kill; return None, or the exit code if the run ended before."""
    limit = time.monotonic() + PATIENCE
    began = None
    at = time.monotonic() + moments.uniform(0, 1.0)  # of a kill while it starts
    while time.monotonic() < limit:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if kill == "start" and time.monotonic() > at:
            return None
        if began is None and kill != "start" and read_progress(folder) != before:
            began = time.monotonic()
            # Not always the first save of a start.
            at = began + (moments.uniform(0, 0.2) if kill == "save" else kill or 0)
        is_due = began is not None and kill is not None and time.monotonic() > at
        if is_due and (kill != "save" or any((folder / "checkpoints").glob("partial-ep*"))):
            return None
        time.sleep(0.0005)
    raise AssertionError((folder / "log").read_text())


def read_progress(folder: Path) -> int:
    """Return a number that grows with every batch that starts."""
    path = folder / "diary.jsonl"
    return path.stat().st_size if path.exists() else 0


def finish(folder: Path, met: dict[str, Any], code: int) -> None:
    (folder / "result.json").write_text(json.dumps({**met, "code": code}))
    sys.exit(0)
