"""Fetched shards: here before they are read, within the limit, never wrong."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from foundry_ext.data.prepared import local_shards
from foundry_ext.data.prepared.local_shards import LocalFolder, LocalShards
from foundry_ext.data.prepared.storage import Storage
from foundry_ext.utils.errors import UserError
from tests.data.prepared.kit import make_row, write_prepared

NUM = 6


@pytest.fixture
def index(tmp_path):
    rows = [[make_row(50, shard, with_loss=True)] * 4 for shard in range(NUM)]
    return write_prepared(tmp_path / "remote", rows)


def make(tmp_path: Path, index, *, shards: float | None = None) -> LocalShards:
    """Make shards with room for so many of them."""
    size = index.shards[0].bytes
    return LocalShards(
        Storage(str(tmp_path / "remote")),
        index.shards,
        index.recipe.ids,
        LocalFolder(tmp_path / "local", None if shards is None else int(shards * size)),
    )


def here(tmp_path: Path) -> set[str]:
    return {path.stem for path in (tmp_path / "local" / "shards").glob("*.mds")}


def read(files: LocalShards, shard: int) -> list[int]:
    one = np.array([0])
    return files.open_shard(shard).read(one, one, np.array([50])).input_ids.tolist()


def test_next_window_is_fetched_while_one_is_read(tmp_path, index):
    files = make(tmp_path, index)
    files.need([0, 1], [2, 3])
    assert here(tmp_path) >= {index.shards[0].key, index.shards[1].key}
    assert files._fetching is not None
    files._fetching.join()
    assert here(tmp_path) == {index.shards[number].key for number in range(4)}


def test_disk_stays_within_the_limit(tmp_path, index, monkeypatch):
    files = make(tmp_path, index, shards=2.5)
    most = []
    get = Storage.get

    def counting_get(self, name, to):
        get(self, name, to)
        most.append(len(here(tmp_path)))

    monkeypatch.setattr(Storage, "get", counting_get)
    for shard in (*range(NUM), 0):
        files.announce([shard], [(shard + 1) % NUM])
        files.need([shard], [(shard + 1) % NUM])
        assert read(files, shard) == make_row(50, shard, with_loss=True).input_ids.tolist()
    files._wait()
    assert max(most) == 2
    assert here(tmp_path) == {index.shards[0].key, index.shards[1].key}


def test_limit_below_two_windows_is_an_error(tmp_path, index):
    local = make(tmp_path, index, shards=1.5).local
    assert local is not None
    with pytest.raises(UserError, match=r"cache_limit: .* two windows .* raise it, or lower win"):
        local.check(2 * index.shards[0].bytes)


def test_shard_that_another_process_removed_comes_again(tmp_path, index):
    files = make(tmp_path, index)
    files.need([0], [1])
    for path in (tmp_path / "local" / "shards").glob("*.mds"):
        path.unlink()
    assert read(files, 0) == make_row(50, 0, with_loss=True).input_ids.tolist()


def test_error_of_the_thread_is_raised_where_the_window_is_needed(tmp_path, index):
    files = make(tmp_path, index)
    (Path(files.storage.place) / "shards" / index.shards[1].key / "shard.00000.mds").unlink()
    files.need([0], [1])
    assert files._fetching is not None
    files._fetching.join()
    with pytest.raises(UserError, match=r"is missing, which the index names; run `foundry-ext pre"):
        files._wait()


def test_shard_is_fetched_once_by_many_threads(tmp_path, index, monkeypatch):
    fetched = []
    get = Storage.get

    def slow_get(self, name, to):
        fetched.append(name)
        time.sleep(0.1)
        get(self, name, to)

    monkeypatch.setattr(Storage, "get", slow_get)
    processes = [make(tmp_path, index) for _ in range(4)]
    threads = [threading.Thread(target=files.need, args=([0, 1], [])) for files in processes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == 2


def test_part_of_a_file_left_by_a_kill_is_not_taken_for_it(tmp_path, index):
    files = make(tmp_path, index)
    path = tmp_path / "local" / "shards" / f"{index.shards[0].key}.mds"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half")
    assert read(files, 0) == make_row(50, 0, with_loss=True).input_ids.tolist()


def test_damaged_file_is_an_error(tmp_path, index):
    files = make(tmp_path, index)
    files.need([0], [])
    (path,) = (tmp_path / "local" / "shards").glob("*.mds")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="not those that were written; delete it, and fetch"):
        files.open_shard(0)


def test_full_disk_is_an_error_before_anything_is_written(tmp_path, index, monkeypatch):
    monkeypatch.setattr(local_shards, "free_bytes", lambda folder: 5)
    with pytest.raises(UserError, match=r"local/shards: 5 bytes are free, and a shard has"):
        make(tmp_path, index).need([0], [])
    assert not here(tmp_path)


def test_folder_without_local_is_read_in_place(tmp_path, index):
    files = LocalShards(Storage(str(tmp_path / "remote")), index.shards, index.recipe.ids)
    files.need([0], [1])
    assert read(files, 3) == make_row(50, 3, with_loss=True).input_ids.tolist()
    assert not (tmp_path / "local").exists()
