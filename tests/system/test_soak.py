"""Soak: a long-running loader or training does not accumulate memory, files or threads.

`make test-slow`, or `pytest -m slow -s tests/system/test_soak.py` to read the slopes.
"""

import gc
import itertools
import json
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path

import llmfoundry.registry
import numpy as np
import pytest
from composer.core import Callback

from tests.data.kit import BUILT, build
from tests.training import kit

BATCHES, STEPS = 20_000, 2_000
LEAK = 4096  # bytes a step, in the test that a leak is seen


def anonymous_bytes(pid: int | str = "self") -> int:
    """Return the bytes that a process has allocated, swapped or not; file pages do not count."""
    fields = (line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines())
    return 1024 * sum(int(one[1]) for one in fields if one[0] in ("Anonymous:", "Swap:"))


def children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def handles() -> tuple[int, int, int]:
    """Return the numbers of open files, threads and child processes."""
    return len(os.listdir("/proc/self/fd")), threading.active_count(), len(children())


@dataclass
class Curve:
    """Allocated memory at some steps, for this process (0) and its workers (1, 2, ...)."""

    others: set[int] = field(default_factory=lambda: set(children()))
    """Child processes of earlier tests."""
    steps: list[int] = field(default_factory=list)
    sizes: list[list[int]] = field(default_factory=list)

    def look(self, step: int) -> None:
        gc.collect()
        self.steps.append(step)
        workers = sorted(set(children()) - self.others)
        self.sizes.append([anonymous_bytes(pid) for pid in ("self", *workers)])

    def slopes(self) -> list[float]:
        """Return bytes per step by least squares over the second half; caches fill in the first."""
        half = len(self.steps) // 2
        return [
            float(np.polyfit(self.steps[half:], sizes, 1)[0])
            for sizes in np.array(self.sizes[half:]).T
        ]


@pytest.fixture(scope="module")
def many_rows(make_rows, tmp_path_factory) -> Path:
    """Write enough rows for an epoch of some hundred batches."""
    path = tmp_path_factory.mktemp("soak") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in make_rows(3000, seed=3, longest=12)))
    return path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 2])
def test_loader(world, many_rows, workers: int):
    # The first loader leaves what a process has once: a progress bar's thread, a resource tracker.
    read_batches(world, many_rows, workers, 10)
    before, curve = handles(), Curve()
    read_batches(world, many_rows, workers, BATCHES, curve)
    slopes = curve.slopes()
    print(f"\n{BATCHES} batches, {workers} workers: {[f'{s:.1f}' for s in slopes]} bytes a batch")
    assert len(slopes) == 1 + workers
    assert max(slopes) < 50  # a tenth of the smallest batch's tensors
    assert handles() == before


def read_batches(world, rows: Path, workers: int, num: int, curve: Curve | None = None) -> None:
    dataset = {"hf_name": str(rows), "split": "train", "max_seq_len": 32, "pack_tokens": 64}
    spec = build(kit.load_tokenizer(world), {**dataset, "shuffle": True}, num_workers=workers)
    batches = itertools.chain.from_iterable(itertools.repeat(spec.dataloader))
    for seen, _ in enumerate(itertools.islice(batches, num), start=1):
        if curve is not None and seen % 500 == 0:
            curve.look(seen)
    BUILT.pop().dataloader._iterator = None  # its workers end
    del batches, spec
    gc.collect()


class Soak(Callback):
    def __init__(self, leak: bool = False):
        self.curve, self.handles = Curve(), []
        self.leaked: list[bytes] | None = [] if leak else None

    def batch_end(self, state, logger):
        step = state.timestamp.batch.value
        if self.leaked is not None:
            self.leaked.append(os.urandom(LEAK))
        if step % 50 == 0:
            self.curve.look(step)
            self.handles.append(handles())


llmfoundry.registry.callbacks.register("soak", func=Soak)


def train(world, folder, many_rows, method: str, *, leak: bool = False) -> Soak:
    config = kit.run_config(
        world,
        folder,
        method,
        callbacks={
            "packed_throughput": {},
            # At this learning rate the tiny model spikes now and then.
            "guard": {"spike_factor": 1e6},
            "exact_resume": {},
            "run_record": {"path": str(folder / "record.json"), "experiment": "soak"},
            "soak": {"leak": leak},
        },
        train_loader=kit.loader_config(many_rows, shuffle=True),
        eval_loader=kit.loader_config(world.eval_rows, eval_packs=1),
        eval_interval="400ba",
        loggers={"metrics_file": {"path": str(folder / "metrics.jsonl")}},
        log_config=True,
        max_duration=f"{STEPS}ba",
        save_interval="500ba",
        save_num_checkpoints_to_keep=2,
    )
    trainer = kit.train(config)
    trainer.close()
    return next(one for one in trainer.state.callbacks if isinstance(one, Soak))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", kit.METHODS)
def test_training(world, tmp_path, many_rows, method: str):
    """Training with evaluations and checkpoints in between holds no more memory over time."""
    soak = train(world, tmp_path, many_rows, method)
    (slope,) = soak.curve.slopes()
    print(f"\n{STEPS} steps, {method}: {slope:.1f} bytes a step, {soak.handles[-1]} handles")
    assert slope < LEAK / 4
    assert soak.handles[len(soak.handles) // 2] == soak.handles[-1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_leak_is_seen(world, tmp_path, many_rows):
    (slope,) = train(world, tmp_path, many_rows, "full", leak=True).curve.slopes()
    assert slope > LEAK / 2
