"""Numbers of a plan, computed once: shared out over the ranks, and kept for the next start.

<cache folder of `datasets`>/foundry_ext/plans/<key>.json
"""

import contextlib
import json
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets.config
import numpy as np
import xxhash
from composer.utils import dist
from numpy.typing import NDArray

from foundry_ext.data.ranks import from_rank_zero, shared_out
from foundry_ext.utils.atomic import replaced_file
from foundry_ext.utils.progress import progress

PLAN_VERSION = 1  # of cuts, parts of passes, windows and packs: raise it when one of them changes


def planned(
    deciding: Sequence[object],
    num: int,
    width: int,
    work: Callable[[int], Sequence[int]],
    *,
    name: str,
    unit: str,
) -> NDArray[np.int64]:
    """Return [num, width], row i of which is work(i).

    All ranks call it together. Each works on some rows, unless rank 0 finds them in the cache.

    Args:
        deciding: everything that decides the numbers.
        num: how many rows.
        width: numbers of each.
        work: returns the numbers of a row.
        name: of the work, for its progress.
        unit: what a row is about, for its progress.
    """
    key = xxhash.xxh3_128(json.dumps([PLAN_VERSION, *deciding], default=str).encode()).hexdigest()
    path = Path(datasets.config.HF_DATASETS_CACHE, "foundry_ext", "plans", f"{key}.json")
    kept = from_rank_zero(lambda: _read(path, num, width))
    if kept is not None:
        return np.array(kept, dtype=np.int64).reshape(num, width)
    mine = range(dist.get_global_rank(), num, dist.get_world_size())
    shown = dist.get_global_rank() == 0

    def own() -> list[list[int]]:
        bar = progress(mine, name, total=len(mine), unit=unit, shown=shown)
        return [[int(number) for number in work(i)] for i in bar]

    result: list[list[int]] = [[]] * num
    for rank, part in enumerate(shared_out(own)):
        result[rank :: dist.get_world_size()] = part
    if dist.get_local_rank() == 0:
        _write(path, result)
    return np.array(result, dtype=np.int64).reshape(num, width)


def _read(path: Path, num: int, width: int) -> list[list[int]] | None:
    try:
        rows = json.loads(path.read_bytes())
        shape = np.array(rows, dtype=np.int64).reshape(num, width).shape
    except (OSError, ValueError, TypeError):
        return None
    return rows if shape == (num, width) else None


def _write(path: Path, rows: Sequence[Sequence[int]]) -> None:
    partial = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.partial")
    with contextlib.suppress(OSError), replaced_file(path, partial=partial) as file:
        file.write_text(json.dumps(rows), encoding="utf-8")
