"""Cores that a process may use."""

import multiprocessing
import os

import pytest

from foundry_ext.utils.processes import num_cores


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="not on macOS")
def test_cores_are_those_that_this_process_may_use():
    """A container or a batch system may give fewer than the machine has."""

    def count(result) -> None:
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
        result.put(num_cores())

    assert num_cores() == len(os.sched_getaffinity(0))
    context = multiprocessing.get_context("fork")
    result = context.SimpleQueue()
    process = context.Process(target=count, args=(result,))
    process.start()
    assert result.get() == 1
    process.join()
