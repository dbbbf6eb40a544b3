"""Shards on this machine: read where they lie, or fetched before they are needed.

Fetched shards are files in the folder `local`, which all ranks and runs of a node share. Their
total stays within `cache_limit`: the ones that were used longest ago are removed first, and come
again if they are needed. A process that needs a shard fetches it, unless another one does so
already, for which it waits.
"""

import contextlib
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import filelock

from foundry_ext.data.full_disk import free_bytes
from foundry_ext.data.prepared.index import SHARD_FILE, ShardAbout, shard_folder
from foundry_ext.data.prepared.shard import Shard
from foundry_ext.data.prepared.storage import Storage
from foundry_ext.utils.errors import UserError

_ABANDONED = 3600.0  # seconds since a part of a file was written


class LocalFolder:
    """A folder of fetched shards, of one source or of several.

    Args:
        path: the folder, on a disk of this machine.
        limit: most bytes of the shards in it; None for no limit.
    """

    def __init__(self, path: Path, limit: int | None = None):
        self.path, self.limit = path, limit
        self._needed: dict[int, set[str]] = {}

    def keep(self, source: int, keys: set[str]) -> None:
        """Keep the shards of a source's window and of its next one."""
        self._needed[source] = keys

    def check(self, size: int) -> None:
        """Check that two windows of so many bytes are within the limit.

        Raises:
            UserError: they are not.
        """
        if self.limit is not None and size > self.limit:
            raise UserError(
                f"cache_limit: {self.limit:,} bytes do not hold two windows of shards, {size:,}"
                " bytes; raise it, or lower window"
            )

    def file(self, key: str) -> Path:
        return self.path / "shards" / f"{key}.mds"

    def make_room(self, size: int) -> None:
        """Remove the shards used longest ago, other than the needed ones, to stay in the limit.

        Raises:
            UserError: the disk has no room for `size` bytes.
        """
        folder = self.path / "shards"
        with filelock.FileLock(folder / "room.lock"):
            for partial in folder.glob("*.partial"):  # of a process that was killed
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - partial.stat().st_mtime > _ABANDONED:
                        partial.unlink()
            files = {path: path.stat() for path in folder.glob("*.mds")}
            used = sum(status.st_size for status in files.values())
            needed = set().union(*self._needed.values())
            for path in sorted(files, key=lambda one: files[one].st_mtime_ns):
                if self.limit is None or used + size <= self.limit:
                    break
                if path.stem not in needed:
                    path.unlink(missing_ok=True)
                    path.with_suffix(".lock").unlink(missing_ok=True)
                    used -= files[path].st_size
            free = free_bytes(folder)
            if free < size:
                raise UserError(
                    f"{folder}: {free:,} bytes are free, and a shard has {size:,}; make room, set"
                    " cache_limit, or set local to a folder on another disk"
                )


class LocalShards:
    """Files of the shards of a source, by their position in the index.

    Args:
        storage: where the shards are.
        shards: their descriptions.
        ids: type of their token ids.
        local: folder for fetched shards; None to read those of a folder in place.
    """

    def __init__(
        self,
        storage: Storage,
        shards: Sequence[ShardAbout],
        ids: str,
        local: LocalFolder | None = None,
    ):
        self.storage, self.shards, self.ids, self.local = storage, shards, ids, local
        self._window: tuple[list[int], list[int]] = [], []
        self._fetching: threading.Thread | None = None
        self._error: BaseException | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the thread behind: a worker process reads, and fetches what is missing."""
        return {**self.__dict__, "_fetching": None, "_error": None}

    def open_shard(self, shard: int) -> Shard:
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
            path = self._fetch(about, self.local)
            with contextlib.suppress(FileNotFoundError):
                return Shard(path, about.mds, self.ids)
        raise UserError(
            f"{self.local.path}: {about.key} was removed each time it was fetched; raise"
            " cache_limit, or give each run a folder of its own"
        )

    def announce(self, now: Sequence[int], next_: Sequence[int]) -> None:
        """Keep the shards of a window and of the next one from being removed."""
        if self.local is not None:
            self.local.keep(id(self), {self.shards[shard].key for shard in (*now, *next_)})

    def need(self, now: Sequence[int], next_: Sequence[int]) -> None:
        """Wait until the shards of a window are here, and begin to fetch those of the next one.

        Raises:
            UserError: as in `open_shard`.
        """
        if self.local is None or self._window == (window := (list(now), list(next_))):
            return
        self._wait()
        self._window = window
        for shard in now:
            self._fetch(self.shards[shard], self.local)
        self._fetching = threading.Thread(
            target=self._fetch_all, args=(next_, self.local), daemon=True
        )
        self._fetching.start()

    def _fetch_all(self, shards: Sequence[int], local: LocalFolder) -> None:
        try:
            for shard in shards:
                self._fetch(self.shards[shard], local)
        except BaseException as error:  # raised where it is waited for
            self._error = error

    def _wait(self) -> None:
        if self._fetching is not None:
            self._fetching.join()
            self._fetching = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _fetch(self, about: ShardAbout, local: LocalFolder) -> Path:
        path = local.file(about.key)
        if not _is_here(path, about):
            path.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(path.with_suffix(".lock")):
                if not _is_here(path, about):
                    local.make_room(about.bytes)
                    name = f"{shard_folder(about.key)}/{SHARD_FILE}"
                    with _naming_missing(Path(self.storage.place, name)):
                        self.storage.get(name, path)
        return path


def _is_here(path: Path, about: ShardAbout) -> bool:
    """Return whether a whole file is here, which counts as a use of it."""
    try:
        is_here = path.stat().st_size == about.bytes
        if is_here:
            os.utime(path)
    except FileNotFoundError:
        return False
    return is_here


@contextlib.contextmanager
def _naming_missing(path: Path):
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is missing, which the index names; run `foundry-ext prepare` again, which"
            " makes what is missing"
        ) from error
