"""Lock that lets one run at a time use a folder."""

import fcntl
import os
import socket
from pathlib import Path

from foundry_ext.utils.errors import UserError


class FolderLock:
    """Lock held until it is released or the process ends, however it ends.

    A record lock is not inherited by a loader's workers, which may outlive a killed run.
    """

    def __init__(self, folder: Path):
        self.path = folder / ".lock"
        self._file: int | None = None

    def take(self) -> None:
        """Take the lock; a UserError names the process that holds it already."""
        if self._file is not None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = os.pread(file, 200, 0).decode(errors="replace").strip()
            os.close(file)
            raise UserError(
                f"{self.path.parent}: another run ({holder or 'unknown process'}) is still saving"
                " checkpoints there; wait until it ends, or stop it"
            ) from None
        except OSError:  # a file system without locks
            os.close(file)
            return
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self._file = file

    def release(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
