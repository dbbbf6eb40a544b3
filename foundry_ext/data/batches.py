"""Rows in batches of bounded size, and work on the batches in several processes.

Rows weigh from 50 bytes (a chat) to many MB (a book), so a number of rows says little about the
memory and the time that they take. Bytes decide both here.
"""

import contextlib
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from foundry_ext.utils.errors import UserError

T = TypeVar("T")
Batch = TypeVar("Batch")  # such as a range of rows

_MOST_ROWS = 1000
_MOST_BYTES = 2**24
# Bytes that are worth a process. Text takes about a second per MB, a process half a second to
# start on a busy machine.
_BYTES_PER_PROCESS = 2**22
_PARENT_CHECK = 1.0  # seconds


def row_sizes(rows: datasets.Dataset) -> NDArray[np.int64]:
    """Return [n], about how many bytes each row has; the rows themselves are not read."""
    sizes = np.zeros(rows.data.num_rows, np.int64)
    for column in rows.data.columns:
        start = 0
        for chunk in column.chunks:
            sizes[start : start + len(chunk)] += _value_sizes(chunk)
            start += len(chunk)
    chosen = rows._indices  # of a selection, whose table has all rows
    return sizes if chosen is None else sizes[chosen.column(0).to_numpy()]


def _value_sizes(array: Any) -> NDArray[np.int64] | int:
    """Return [n] bytes of an Arrow array's values, or one number if all have the same."""
    kind = array.type
    if isinstance(array, pa.ExtensionArray):
        return _value_sizes(array.storage)
    if pa.types.is_string(kind) or pa.types.is_binary(kind) or pa.types.is_large_string(kind):
        return pc.fill_null(pc.binary_length(array), 0).to_numpy(zero_copy_only=False)  # pyright: ignore
    if pa.types.is_struct(kind):
        return sum((_value_sizes(field) for field in array.flatten()), 0)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        values = np.zeros(len(array.values) + 1, np.int64)
        values[1:] = _value_sizes(array.values)
        np.cumsum(values, out=values)
        offsets = array.offsets.to_numpy()
        return values[offsets[1:]] - values[offsets[:-1]]
    return 8


def split_rows(
    sizes: NDArray[np.int64], *, most_bytes: int = _MOST_BYTES, most_rows: int = _MOST_ROWS
) -> list[range]:
    """Return batches of neighbouring rows, each of at most `most_bytes`, or of a single row.

    Example: sizes [5, 5, 20, 1] and 10 bytes give the rows 0 to 1, 2, and 3.
    """
    ends, batches, start = np.cumsum(sizes), [], 0
    while start < len(sizes):
        before = ends[start - 1] if start else 0
        end = int(np.searchsorted(ends, before + most_bytes, side="right"))
        end = min(max(end, start + 1), start + most_rows, len(sizes))
        batches.append(range(start, end))
        start = end
    return batches


def count_processes(num_bytes: int, most: int) -> int:
    """Return the processes that so many bytes of rows deserve, from 1 to `most`."""
    return max(1, min(most, num_bytes // _BYTES_PER_PROCESS))


def work_on(
    batches: Sequence[Batch], work: Callable[[Batch], T], num_processes: int
) -> Generator[T, None, None]:
    """Yield work(batch) of each batch, in order, whatever the number of processes.

    Raises:
        UserError: a process was killed.
        Exception: `work` raised it, in whatever process.
    """
    num_processes = min(num_processes, len(batches))
    if num_processes <= 1:
        yield from map(work, batches)
        return
    # A forked process has `work` with its rows and tokenizer at once, without a copy.
    start = "fork" if sys.platform == "linux" else None
    executor = ProcessPoolExecutor(
        num_processes,
        mp_context=multiprocessing.get_context(start),
        initializer=_begin,
        initargs=(work, os.getpid()),
    )
    try:
        with _one_thread_each():
            results = executor.map(_call, batches)
        yield from results
    except BrokenProcessPool as error:
        raise UserError(
            f"one of {num_processes} processes that tokenize was killed, perhaps because memory"
            " was full; set the environment variable MAX_NUM_PROC to a smaller number, or prepare's"
            " --workers, and start the same command again"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


_work: Any = None  # in a process of `work_on`


def _begin(work: Callable[[Any], Any], parent: int) -> None:
    global _work
    _work = work
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _call(batch: Any) -> Any:
    return _work(batch)


def _end_with(parent: int) -> None:
    """End this process when its parent has been killed; it would wait for work forever."""
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK)
    os._exit(1)


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Let processes that are started now encode on one thread, as many as there are cores.

    The tokenizer's threads do not survive a fork either.
    """
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
