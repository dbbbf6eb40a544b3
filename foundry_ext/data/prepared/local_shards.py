"""Shards on this machine: read where they lie, or fetched before they are needed.

Fetched shards are files in the folder `local`, which all ranks and runs of a node share. Their
total stays within `cache_limit`: the ones that were used longest ago are removed first, and come
again if they are needed. A process that needs a shard fetches it, unless another one does so
already, for which it waits.
"""

import contextlib
import logging
import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

import filelock

from foundry_ext.data.prepared.index import SHARD_FILE, ShardAbout, shard_folder
from foundry_ext.data.prepared.shard import Shard
from foundry_ext.data.prepared.storage import Storage
from foundry_ext.utils.errors import UserError

log = logging.getLogger(__name__)


class LocalShards:
    """Files of shards, by their position in the index.

    Args:
        storage: where the shards are.
        shards: their descriptions.
        ids: type of their token ids.
        local: folder for fetched shards; None to read those of a folder in place.
        cache_limit: most bytes of fetched shards; None for no limit.
    """

    def __init__(
        self,
        storage: Storage,
        shards: Sequence[ShardAbout],
        ids: str,
        *,
        local: Path | None = None,
        cache_limit: int | None = None,
    ):
        self.storage, self.shards, self.ids = storage, shards, ids
        self.local, self.cache_limit = local, cache_limit
        self._needed: set[str] = set()
        self._fetching: threading.Thread | None = None
        self._error: BaseException | None = None

    def __getstate__(self) -> dict:
        """Leave the thread behind: a worker process reads, and fetches what is missing."""
        return {**self.__dict__, "_fetching": None, "_error": None}

    def open(self, shard: int) -> Shard:
        """Return a shard, fetched if it is not here.

        Raises:
            UserError: it is not in the storage, or its bytes are not those that were written.
        """
        about = self.shards[shard]
        if self.local is None:
            path = self.storage.path(f"{shard_folder(about.key)}/{SHARD_FILE}")
            with _naming_missing(path):
                return Shard(path, about.mds, self.ids)
        for _ in range(3):
            # Between the two lines another process may remove it, to make room.
            path = self._fetch(about)
            with contextlib.suppress(FileNotFoundError):
                return Shard(path, about.mds, self.ids)
        raise UserError(
            f"{self.local}: {about.key} was removed each time it was fetched; raise cache_limit, or"
            " give each run a folder of its own"
        )

    def need(self, now: Sequence[int], next_: Sequence[int]) -> None:
        """Wait until the shards of a window are here, and begin to fetch those of the next one."""
        if self.local is None:
            return
        needed = {self.shards[shard].key for shard in (*now, *next_)}
        if needed == self._needed:
            return
        self._wait()
        self._needed = needed
        self._check_limit(now, next_)
        for shard in now:
            self._fetch(self.shards[shard])
        self._fetching = threading.Thread(target=self._fetch_all, args=(next_,), daemon=True)
        self._fetching.start()

    def _check_limit(self, now: Sequence[int], next_: Sequence[int]) -> None:
        shards = {self.shards[shard].key: self.shards[shard].bytes for shard in (*now, *next_)}
        size = sum(shards.values())
        if self.cache_limit is not None and size > self.cache_limit:
            raise UserError(
                f"cache_limit: {self.cache_limit:,} bytes do not hold two windows of shards,"
                f" {size:,} bytes; raise it, or lower window"
            )

    def _fetch_all(self, shards: Sequence[int]) -> None:
        try:
            for shard in shards:
                self._fetch(self.shards[shard])
        except BaseException as error:  # raised where it is waited for
            self._error = error

    def _wait(self) -> None:
        if self._fetching is not None:
            self._fetching.join()
            self._fetching = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _fetch(self, about: ShardAbout) -> Path:
        assert self.local is not None
        path = self.local / "shards" / f"{about.key}.mds"
        if not self._is_here(path, about):
            path.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(path.parent / f"{about.key}.lock"):
                if not self._is_here(path, about):
                    self._make_room(about.bytes)
                    name = f"{shard_folder(about.key)}/{SHARD_FILE}"
                    with _naming_missing(Path(self.storage.place, name)):
                        self.storage.get(name, path)
        return path

    def _is_here(self, path: Path, about: ShardAbout) -> bool:
        """Return whether a whole file is here, which counts as a use of it."""
        try:
            is_here = path.stat().st_size == about.bytes
            if is_here:
                os.utime(path)
        except FileNotFoundError:
            return False
        return is_here

    def _make_room(self, size: int) -> None:
        """Remove the shards used longest ago, other than the needed ones, to stay in the limit."""
        assert self.local is not None
        folder = self.local / "shards"
        with filelock.FileLock(folder / "room.lock"):
            files = {path: path.stat() for path in folder.glob("*.mds")}
            used = sum(status.st_size for status in files.values())
            for path in sorted(files, key=lambda one: files[one].st_mtime_ns):
                if self.cache_limit is None or used + size <= self.cache_limit:
                    break
                if path.stem not in self._needed:
                    path.unlink(missing_ok=True)
                    (folder / f"{path.stem}.lock").unlink(missing_ok=True)
                    used -= files[path].st_size
            free = shutil.disk_usage(folder).free
            if free < size:
                raise UserError(
                    f"{folder}: {free:,} bytes are free, and a shard has {size:,}; make room, set"
                    " cache_limit, or set local to a folder on another disk"
                )


@contextlib.contextmanager
def _naming_missing(path: Path):
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is missing, which the index names; run `foundry-ext prepare` again, which"
            " makes what is missing"
        ) from error
