"""Files of a catalog, in a folder or an object store: listed, read, replaced in one step, deleted.

Only for what Delta's own library has no words for: finding damage, and forgetting. fsspec serves object stores; on a
local disk its `pipe_file` overwrites in place and without fsync, so that a kill leaves half a file.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, BinaryIO

from datakit.errors import CatalogError, MissingDependency


@dataclass(frozen=True, slots=True)
class Stored:
    """A file: bytes, and when it was written (seconds since 1970)."""

    size: int
    modified: float


class Storage:
    """The files under a root. Paths are relative to it, with forward slashes, as they are on disk.

    Raises:
        MissingDependency: an object store whose fsspec library is not installed.
    """

    def __init__(self, root: str):
        self.root = root.rstrip("/")
        self.is_local = "://" not in root
        if not self.is_local:
            self._fs, self._base = _file_system(self.root)

    def list(self, folder: str) -> dict[str, Stored]:
        """Every file below a folder; none when it is not there."""
        return self._list_local(folder) if self.is_local else self._list_remote(folder)

    def stat(self, path: str) -> Stored | None:
        """None: no such file."""
        if not self.is_local:
            return self.list(path).get(path)
        try:
            found = os.stat(f"{self.root}/{path}")
        except FileNotFoundError:
            return None
        return Stored(found.st_size, found.st_mtime)

    def read(self, path: str) -> bytes:
        with self.open(path) as file:
            return file.read()

    def open(self, path: str) -> BinaryIO:
        if self.is_local:
            return open(f"{self.root}/{path}", "rb")
        return self._fs.open(f"{self._base}/{path}", "rb")

    def create(self, path: str) -> BinaryIO:
        """A file to write to, one piece after another; it is whole when it is closed."""
        if not self.is_local:
            return self._fs.open(f"{self._base}/{path}", "wb")
        os.makedirs(os.path.dirname(f"{self.root}/{path}"), exist_ok=True)
        return open(f"{self.root}/{path}", "wb")

    def replace(self, path: str, data: bytes, modified: float | None = None) -> None:
        """Write a file whole or not at all: readers see the one before, or this one.

        Args:
            modified: time to give it, where files have one of their own.
        """
        if not self.is_local:
            self._fs.pipe_file(f"{self._base}/{path}", data)
            return
        target = f"{self.root}/{path}"
        folder, name = os.path.split(target)
        os.makedirs(folder, exist_ok=True)
        unfinished = f"{folder}/.{name}.unfinished"  # the same after a kill: written anew
        with open(unfinished, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if modified is not None:
            os.utime(unfinished, (modified, modified))
        os.replace(unfinished, target)

    def delete(self, path: str) -> None:
        """Remove a file; nothing when it is gone."""
        try:
            if self.is_local:
                os.remove(f"{self.root}/{path}")
            else:
                self._fs.rm_file(f"{self._base}/{path}")
        except FileNotFoundError:
            return

    def move(self, path: str, to: str) -> None:
        """Give a file another name."""
        if self.is_local:
            os.replace(f"{self.root}/{path}", f"{self.root}/{to}")
        else:
            self._fs.pipe_file(f"{self._base}/{to}", self.read(path))
            self.delete(path)

    def _list_local(self, folder: str) -> dict[str, Stored]:
        found = {}
        for parent, _, names in os.walk(f"{self.root}/{folder}"):
            for name in names:
                path = f"{parent}/{name}"
                try:
                    status = os.stat(path)
                except FileNotFoundError:  # deleted meanwhile
                    continue
                found[path[len(self.root) + 1 :]] = Stored(status.st_size, status.st_mtime)
        return found

    def _list_remote(self, folder: str) -> dict[str, Stored]:
        self._fs.invalidate_cache()
        found = self._fs.find(f"{self._base}/{folder}", detail=True)
        return {path[len(self._base) + 1 :]: Stored(info["size"], _modified(info)) for path, info in found.items()}


def _file_system(root: str):
    import fsspec

    try:
        return fsspec.core.url_to_fs(root)
    except ImportError as e:
        extra = {"s3": "s3", "gs": "gcs"}.get(root.partition("://")[0])
        raise MissingDependency(f"cannot look at files of {root}: {e}" + (f" (extra {extra})" if extra else "")) from e
    except ValueError as e:
        raise CatalogError(f"cannot look at files of {root}: {e}") from e


def _modified(info: dict[str, Any]) -> float:
    """Object stores call it differently; 0 where none is known."""
    moment: Any = info.get("LastModified") or info.get("last_modified") or info.get("updated") or info.get("mtime")
    return (
        moment.timestamp()
        if hasattr(moment, "timestamp")
        else float(moment)
        if isinstance(moment, (int, float))
        else 0.0
    )
