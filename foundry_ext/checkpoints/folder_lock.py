"""Lock that lets one run at a time use a folder."""

import contextlib
import fcntl
import os
import socket
import struct
import sys
from pathlib import Path

from foundry_ext.utils.errors import UserError


class FolderLock:
    """Lock held until it is released or the process ends, however it ends.

    A record lock is not inherited by a loader's workers, which may outlive a killed run.
    """

    def __init__(self, folder: Path):
        self.path = folder / ".lock"
        self._file: int | None = None
        self._is_new = False
        self._new_folders: list[Path] = []

    def take(self) -> None:
        """Take the lock; a UserError names the process that holds it already.

        A lock file that is there already keeps its content until `sign`.
        """
        if self._file is not None:
            return
        folder = self.path.parent
        self._new_folders = [x for x in (folder, *folder.parents) if not x.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self._is_new = not self.path.exists()
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = _holder(file)
            os.close(file)
            raise UserError(
                f"{self.path.parent}: another run ({holder}) is still saving checkpoints there;"
                " wait until it ends, or stop it"
            ) from None
        except OSError:  # a file system without locks
            os.close(file)
            return
        if os.fstat(file).st_nlink == 0:  # its holder removed it before the lock was taken
            os.close(file)
            return self.take()
        self._file = file
        if self._is_new:
            self.sign()

    def sign(self) -> None:
        """Write into the lock file who holds it."""
        if self._file is not None:
            os.ftruncate(self._file, 0)
            name = f"process {os.getpid()} on {socket.gethostname()}\n"
            os.pwrite(self._file, name.encode(), 0)

    def release(self) -> None:
        """Release the lock; a folder in which nothing was saved is left as it was found."""
        if self._file is None:
            return
        with contextlib.suppress(OSError):  # the folder is gone, or another process uses it by now
            if self._is_new and os.listdir(self.path.parent) == [self.path.name]:
                self.path.unlink()
                for folder in self._new_folders:
                    folder.rmdir()
        os.close(self._file)
        self._file = None


def _holder(file: int) -> str:
    """Return the process that holds the lock, as the kernel knows it and the file describes it."""
    if sys.platform == "darwin":  # struct flock: start, length, pid, type, whence
        asked = struct.pack("qqihh", 0, 0, 0, fcntl.F_WRLCK, os.SEEK_SET)
        pid = struct.unpack("qqihh", fcntl.fcntl(file, fcntl.F_GETLK, asked))[2]
    else:  # Linux's: type, whence, start, length, pid
        asked = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        pid = struct.unpack("hhqqi", fcntl.fcntl(file, fcntl.F_GETLK, asked))[-1]
    signed = os.pread(file, 200, 0).decode(errors="replace").strip()
    if pid <= 0 or signed.startswith(f"process {pid} "):
        return signed or "unknown process"
    return f"process {pid}"
