"""Files and folders that are there whole or not at all.

What is made gets a name of its own beside its target first, hidden and with the target's ending (encoders go by that),
and the target's name when it is whole. A reader sees what was there before, or the new; two writers of one target do
not meet, and the later one's counts. What a writer leaves behind that is killed in the middle, `sweep` removes.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import socket
from collections.abc import Generator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from datakit.hashing import hash_hex

LONGEST = 60
"""Characters of the target's name in that of what becomes it: file systems take 255 bytes."""
TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
"""Errors of a rename over a folder that holds something, or between a folder and a file."""


@contextmanager
def atomic_path(target: str | os.PathLike[str], durable: bool = False) -> Generator[Path]:
    """A path to write a file to, which takes the target's name when the block ends.

    If the block fails, or has deleted the file, the target stays as it was.

    Args:
        target: a file, in a folder that is there.
        durable: whether the file is on the disk for certain before it takes the name, and the name after.

    Raises:
        OSError: the folder is not there, or cannot be written.
    """
    target = Path(target)
    path = beside(target)
    path.touch(exist_ok=False)
    mode = path.stat().st_mode
    try:
        yield path
        if not path.exists():
            return
        if path.stat().st_mode != mode:  # safetensors makes files that only their owner can read
            path.chmod(mode)
        if durable:
            sync(path)
        path.replace(target)
        if durable:
            sync(target.parent)
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: str | os.PathLike[str]) -> Generator[Path]:
    """An empty folder to fill, which takes the target's name when the block ends; what had it before goes (see `put`).

    If the block fails, the target stays as it was.

    Raises:
        OSError: the folder's parent is not there, or cannot be written.
    """
    path = beside(Path(target))
    path.mkdir()
    try:
        yield path
        put(path, target)
    finally:
        shutil.rmtree(path, ignore_errors=True)


def put(source: Path, target: str | os.PathLike[str]) -> None:
    """Give a finished file or folder its name. A folder that has it is taken out of the way, then deleted."""
    target, gone = Path(target), []
    while True:
        try:
            source.replace(target)
            break
        except OSError as e:
            if e.errno not in TAKEN:
                raise
            gone += _moved_away(target)
    for old in gone:
        _delete(old)


def remove(target: Path) -> None:
    """Delete a file or folder; its name is gone at once, however long it takes."""
    for old in _moved_away(target):
        _delete(old)


def sweep(target: Path) -> None:
    """Delete what writers of a target left behind that were killed on this machine."""
    for path in target.parent.glob(f".{_machine()}-*-{escape(_end(target))}"):
        pid = path.name.split("-")[1]
        if not pid.isdigit() or not os.path.exists(f"/proc/{pid}"):
            _delete(path)


def beside(target: Path) -> Path:
    """A new name in the target's folder, which says whose it is."""
    return target.with_name(f".{_machine()}-{os.getpid()}-{secrets.token_hex(3)}-{_end(target)}")


def sync(path: Path) -> None:
    """Have a file or folder on the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _end(target: Path) -> str:
    return target.name[-LONGEST:]


def _machine() -> str:
    return hash_hex(socket.gethostname(), 3)


def _moved_away(target: Path) -> list[Path]:
    """Where the target is now, if it was there."""
    old = beside(target)
    try:
        target.rename(old)
    except FileNotFoundError:  # another writer was faster
        return []
    return [old]


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
