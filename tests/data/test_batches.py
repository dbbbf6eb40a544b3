"""Rows in batches by bytes, and work on them in processes."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import datasets
import numpy as np
import pytest

from foundry_ext.data import batches as module
from foundry_ext.data.batches import count_processes, row_sizes, split_rows, work_on
from foundry_ext.utils.errors import UserError


def test_a_batch_has_few_bytes_or_a_single_row():
    sizes = np.array([5, 5, 20, 1, 10, 0, 0])
    found = split_rows(sizes, most_bytes=10)
    assert found == [range(2), range(2, 3), range(3, 4), range(4, 7)]
    assert split_rows(sizes, most_bytes=99, most_rows=3) == [range(3), range(3, 6), range(6, 7)]


def test_the_size_of_a_row_is_that_of_its_values():
    message = {"role": "user", "content": "x" * 100}
    rows = [
        {"text": "é" * 500, "n": 1, "turns": [message] * 3, "none": None},
        {"text": None, "n": None, "turns": [], "none": None},
        {"text": "ab", "n": 2, "turns": [message], "none": None},
    ]
    whole = datasets.Dataset.from_list(rows)
    sizes = row_sizes(whole)
    assert sizes.tolist() == [1000 + 3 * 104 + 16, 16, 2 + 104 + 16]
    same = {
        "slice": whole.select(range(1, 3)),
        "selection": whole.select([2, 0]),
        "parts": datasets.concatenate_datasets([whole, whole.select(range(1, 3))]),
    }
    assert {name: row_sizes(one).tolist() for name, one in same.items()} == {
        "slice": sizes[1:].tolist(),
        "selection": sizes[[2, 0]].tolist(),
        "parts": [*sizes, *sizes[1:]],
    }
    assert row_sizes(datasets.Dataset.from_list(rows[:1]).select([])).tolist() == []


def test_processes_are_as_many_as_the_bytes_deserve():
    """900 books of 1 MB are work for all cores; 60,000 chats of 80 bytes are one's."""
    assert count_processes(900 * 10**6, most=16) == 16
    assert count_processes(60_000 * 80, most=16) == 1
    assert count_processes(0, most=16) == 1


@pytest.mark.parametrize("num", [1, 2, 3])
def test_results_come_in_order_however_many_work(num: int):
    def slow_first(batch: range) -> tuple[int, int]:
        time.sleep(0.2 if batch.start == 0 else 0)
        return batch.start, os.getpid()

    batches = [range(i, i + 1) for i in range(6)]
    starts, processes = zip(*work_on(batches, slow_first, num), strict=True)
    assert starts == tuple(range(6))
    assert (os.getpid() in processes) == (num == 1)
    assert len(set(processes)) <= num


def test_an_error_comes_as_it_was_raised():
    def refuse(batch: range) -> None:
        if batch.start == 3:
            raise UserError("row 3 is bad")

    with pytest.raises(UserError, match="row 3 is bad"):
        list(work_on([range(i, i + 1) for i in range(9)], refuse, 2))


def test_a_killed_process_is_said():
    """Linux ends a process that takes too much memory by this signal."""

    def die(batch: range) -> None:
        if batch.start == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(UserError, match=r"memory was full; set .* MAX_NUM_PROC"):
        list(work_on([range(i, i + 1) for i in range(4)], die, 2))


def test_no_process_outlives_a_killed_parent(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(module, "_PARENT_CHECK", 0.05)

    def note(batch: range) -> None:
        (tmp_path / str(os.getpid())).touch()
        time.sleep(60)

    parent = multiprocessing.get_context("fork").Process(
        target=lambda: list(work_on([range(1), range(1, 2)], note, 2))
    )
    parent.start()
    while len(children := [int(path.name) for path in tmp_path.iterdir()]) < 2:
        time.sleep(0.02)
    parent.kill()
    parent.join()
    end = time.monotonic() + 20
    while any(map(_runs, children)):
        assert time.monotonic() < end, children
        time.sleep(0.05)


def _runs(process: int) -> bool:
    """Return whether a process runs; one that has ended may wait for its new parent."""
    try:
        status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"
