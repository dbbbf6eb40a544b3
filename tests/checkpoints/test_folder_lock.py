"""A folder's lock leaves no trace of a start that saved nothing."""

import os

from foundry_ext.checkpoints.folder_lock import FolderLock


def test_a_folder_in_which_nothing_was_saved_is_left_as_it_was(tmp_path):
    lock = FolderLock(tmp_path / "run" / "checkpoints")
    lock.take()
    assert lock.path.exists()
    lock.release()
    assert os.listdir(tmp_path) == []

    (tmp_path / "run").mkdir()  # which was there before
    lock.take()
    lock.release()
    assert os.listdir(tmp_path) == ["run"] and os.listdir(tmp_path / "run") == []


def test_a_folder_may_go_before_its_lock(tmp_path):
    lock = FolderLock(tmp_path / "run")
    lock.take()
    lock.path.unlink()
    lock.path.parent.rmdir()
    lock.release()
    assert os.listdir(tmp_path) == []


def test_a_folder_with_files_keeps_its_lock_file(tmp_path):
    lock = FolderLock(tmp_path)
    lock.take()
    (tmp_path / "ep0-ba1.pt").write_bytes(b"saved")
    lock.release()
    assert sorted(os.listdir(tmp_path)) == [".lock", "ep0-ba1.pt"]
    (tmp_path / "ep0-ba1.pt").unlink()
    lock.take()  # an earlier run's file stays
    lock.release()
    assert os.listdir(tmp_path) == [".lock"]


def test_a_lock_on_a_removed_file_does_not_count(tmp_path, monkeypatch):
    lock = FolderLock(tmp_path)
    real_open = os.open

    def removed_after_open(path, *arguments):
        monkeypatch.setattr(os, "open", real_open)
        file = real_open(path, *arguments)
        os.unlink(path)  # by its holder, which ends just then
        return file

    monkeypatch.setattr(os, "open", removed_after_open)
    lock.take()
    assert lock.path.exists()
    lock.release()
