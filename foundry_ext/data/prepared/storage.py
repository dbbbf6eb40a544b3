"""Storage of prepared data: a folder, or a prefix in an object store such as S3.

Composer's object stores do the transfers, so credentials and endpoints are those of checkpoints.
"""

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from composer.utils import maybe_create_object_store_from_uri, parse_uri

from foundry_ext.utils.errors import UserError, one_line


class Storage:
    """Files by name, in one place.

    Args:
        place: folder, or `s3://bucket/prefix` and others that Composer knows.

    Raises:
        UserError: Composer does not know such a URI, or lacks the package for it.
    """

    def __init__(self, place: str):
        self.place = place.rstrip("/") or "/"
        backend, _, prefix = parse_uri(place)
        self.is_folder, self._prefix = backend == "", prefix.rstrip("/")
        self._objects = self._connect()

    def _connect(self) -> Any:
        try:
            return None if self.is_folder else maybe_create_object_store_from_uri(self.place)
        except (NotImplementedError, ImportError, ValueError) as error:
            raise UserError(
                f"{self.place}: {one_line(error)}; give a folder, or a URI such as"
                " s3://bucket/folder"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        """Leave the connection behind, for another process to make its own."""
        return {**self.__dict__, "_objects": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._objects = self._connect()

    def _object(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    def path(self, name: str) -> Path:
        """Return where a file of a folder lies."""
        assert self.is_folder
        return Path(self.place, name)

    def names(self, prefix: str = "") -> set[str]:
        """Return the names of all files that begin with a prefix, which ends in / or is empty.

        Raises:
            UserError: the object store cannot be reached.
        """
        if self._objects is None:
            folder = self.path(prefix)
            return {
                path.relative_to(self.place).as_posix()
                for path in folder.rglob("*")
                if path.is_file()
            }
        with self._naming():
            start = len(self._object(""))
            return {name[start:] for name in self._objects.list_objects(self._object(prefix))}

    def exists(self, name: str) -> bool:
        """Return whether there is such a file."""
        if self._objects is None:
            return self.path(name).is_file()
        with self._naming():
            try:
                self._objects.get_object_size(self._object(name))
            except FileNotFoundError:
                return False
        return True

    def get(self, name: str, to: Path) -> None:
        """Copy a file to a path, at which it is complete or not there at all.

        Raises:
            FileNotFoundError: there is no such file.
        """
        to.parent.mkdir(parents=True, exist_ok=True)
        partial = to.with_name(f"{to.name}.{uuid.uuid4().hex}.partial")
        try:
            if self._objects is None:
                shutil.copyfile(self.path(name), partial)
            else:
                with self._naming():
                    self._objects.download_object(self._object(name), str(partial))
            os.replace(partial, to)
        finally:
            partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[Path]:
        """Yield a path at which a file can be read: its own, or that of a temporary copy."""
        if self.is_folder:
            yield self.path(name)
            return
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, "file")
            self.get(name, copy)
            yield copy

    def put_text(self, text: str, name: str) -> None:
        """Write a text as a file."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "file")
            path.write_text(text, encoding="utf-8")
            self.put(path, name)

    def put(self, path: Path, name: str) -> None:
        """Copy a file to the storage, where it is complete or not there at all."""
        if self._objects is not None:
            with self._naming():
                self._objects.upload_object(self._object(name), path)
            return
        to = self.path(name)
        to.parent.mkdir(parents=True, exist_ok=True)
        partial = to.with_name(f"{to.name}.{uuid.uuid4().hex}.partial")
        try:
            shutil.copyfile(path, partial)
            os.replace(partial, to)
        finally:
            partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _naming(self):
        try:
            yield
        except (FileNotFoundError, UserError):
            raise
        except Exception as error:  # of any of the stores' packages
            raise UserError(
                f"{self.place}: {type(error).__name__}: {one_line(error)}; check the bucket's name,"
                " the credentials and the endpoint (for S3: AWS_ACCESS_KEY_ID, S3_ENDPOINT_URL)"
            ) from error
