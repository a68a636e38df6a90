"""Bring weights to this machine: from Hugging Face, ModelScope, a plain address, or a folder that mirrors them.

Every source gives a listing (files, sizes, checksums); one loop then fetches whatever is listed into
`FOLDER/NAME.partial`, going on inside a file where an earlier run stopped. The folder gets its name when every file is
there and right.

huggingface_hub 2.4 starts the file of an interrupted run again: of 64 MiB, stopped at 48, it fetches 112, this 64; the
largest file here has 24 GB.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datakit.atomic import put
from datakit.errors import DownloadError
from datakit.weights.hubs import Listing, RemoteFile, Unreachable, list_files, open_at
from datakit.weights.registry import DEFAULT_FOLDER, ModelInfo, find, is_whole, visible_files

RECORD = ".datakit.json"
"""In every downloaded folder: where it came from, revision, files. Also tells whether a partial one can go on."""
FILES_AT_ONCE = 4
ATTEMPTS = 6
RETRY_S = 1.0
"""Seconds before the first new attempt at a file; doubled each time, forgotten when bytes arrive."""
PATIENCE_S = 2.0
"""How long a stopped download waits for its threads; one that hangs on a dead connection writes nothing any more."""
PART = ".part"
SPARE_BYTES = 64 << 20
"""Disk space that stays free."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Size:
    """Bytes of a model, None where unknown; `exact` when its source said so."""

    bytes: int | None
    exact: bool


def sizes(info: ModelInfo, source: str = "huggingface", revision: str | None = None) -> Size:
    """How much there is to download: as the source says, or as the table has it where the source is out of reach.

    Raises:
        DownloadError, MissingDependency: the source answers, and not with the model.
    """
    try:
        return Size(list_files(info, source, revision).bytes, True)
    except Unreachable:
        return Size(None if info.size_gb is None else int(info.size_gb * 1e9), False)


def download(
    model: ModelInfo | str,
    folder: str | Path = DEFAULT_FOLDER,
    source: str = "huggingface",
    revision: str | None = None,
    on_progress: Progress | None = None,
) -> Path:
    """Put a model's weights into `folder/NAME`; what is there already (at that revision) stays as it is.

    Args:
        model: as in `models.find`.
        source: `huggingface`, `modelscope`, or a folder that holds models as ORG/NAME or as Hugging Face's cache.
        revision: branch, tag or commit; None: the source's main branch.
        on_progress: called with (bytes there, bytes in all), about twice a second.

    Returns:
        What `models.locate` gives for it: a file for single models, else the folder.

    Raises:
        DownloadError: with what to do about it. What was fetched stays, for the next try.
        MissingDependency: no such model, or no library for the source.
    """
    info = find(model) if isinstance(model, str) else model
    home = Path(folder).expanduser()
    target = home / info.name
    if not is_there(info, home, revision):
        listing = list_files(info, source, revision)
        partial = target.with_name(target.name + ".partial")
        with _disk_errors(info, home), _lock(partial, info):
            _prepare(partial, listing)
            _check_space(partial, listing, info)
            _fetch_all(partial, listing, info, on_progress)
            if not is_whole(partial, info):
                raise DownloadError(
                    f"{listing.source} does not hold the whole of {info.name}: what it has is in {partial}"
                )
            _name(partial, target)
    return next(target / file for file in info.files if (target / file).exists()) if info.single else target


def is_there(info: ModelInfo, home: Path, revision: str | None = None) -> bool:
    """Whether a download to `home` has nothing to do; with a revision: that one was downloaded."""
    target = home / info.name
    if not (target.is_dir() and is_whole(target, info)):
        return False
    record = _read_record(target)
    return revision is None or revision in (record.get("asked"), record.get("revision"))


@contextlib.contextmanager
def _disk_errors(info: ModelInfo, home: Path) -> Generator[None]:
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DownloadError(
                f"{info.name}: the disk of {home} is full; free some space, the same command goes on from there"
            ) from e
        raise DownloadError(f"{info.name}: cannot write to {home}: {e.strerror or e}") from e


@contextlib.contextmanager
def _lock(partial: Path, info: ModelInfo) -> Generator[None]:
    """One download of a model at a time: two would write into each other's files."""
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise DownloadError(f"{info.name} is being downloaded by another process into {partial}") from e
        yield


def _prepare(partial: Path, listing: Listing) -> None:
    """Keep what an earlier run fetched of the same files; files of another revision are the same if their hash is."""
    before, now = _read_record(partial), _record(listing)
    same = all(before.get(key) == now[key] for key in ("source", "revision"))
    old = before.get("files", {})
    kept = {
        path for path, (size, sha256) in now["files"].items() if (same or sha256) and old.get(path) == [size, sha256]
    }
    for path in visible_files(partial):
        if path.relative_to(partial).as_posix().removesuffix(PART) not in kept:
            path.unlink()
    (partial / RECORD).write_text(json.dumps(now, indent=1))


def _record(listing: Listing) -> dict[str, Any]:
    files = {file.path: [file.size, file.sha256] for file in listing.files}
    return {"source": listing.source, "asked": listing.asked, "revision": listing.revision, "files": files}


def _read_record(folder: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        return json.loads((folder / RECORD).read_text())
    return {}


def _check_space(partial: Path, listing: Listing, info: ModelInfo) -> None:
    needed = (listing.bytes or 0) - _bytes_there(partial, listing)
    free = shutil.disk_usage(partial).free
    if needed + SPARE_BYTES > free:
        raise DownloadError(
            f"{info.name} needs {needed / 1e9:.2f} GB, and the disk of {partial.parent} has {free / 1e9:.2f} GB free: "
            "make room, or choose another with --folder"
        )


def _fetch_all(partial: Path, listing: Listing, info: ModelInfo, on_progress: Progress | None) -> None:
    stop = threading.Event()
    pool = ThreadPoolExecutor(FILES_AT_ONCE)
    every: set[Future[None]] = set()
    try:
        every = waiting = {pool.submit(_fetch, file, partial / file.path, info, stop) for file in listing.files}
        while waiting:
            done, waiting = wait(waiting, timeout=0.5, return_when="FIRST_EXCEPTION")
            for future in done:
                future.result()
            if on_progress:
                on_progress(_bytes_there(partial, listing), listing.bytes or 0)
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
        wait(every, timeout=PATIENCE_S)


def _fetch(file: RemoteFile, target: Path, info: ModelInfo, stop: threading.Event) -> None:
    """One file, whole and right, or an error."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = _part(target)
    failures, before = 0, -1
    while not stop.is_set():
        try:
            _append(file, part, info, stop)
            if stop.is_set():
                return
            if file.size is None or part.stat().st_size == file.size:
                return _accept(file, part, target, info)
            raise Unreachable(f"{info.name}: {file.path} ended early")
        except Unreachable as e:
            there = part.stat().st_size if part.exists() else 0
            failures, before = (failures + 1 if there == before else 1), there
            if failures >= ATTEMPTS:
                raise DownloadError(f"{e}; the same command goes on from there") from e
            stop.wait(RETRY_S * 2 ** (failures - 1))


def _append(file: RemoteFile, part: Path, info: ModelInfo, stop: threading.Event) -> None:
    offset = part.stat().st_size if part.exists() else 0
    if part.exists() and offset == file.size:
        return
    with open_at(file, offset, info) as (read, start):
        if stop.is_set():
            return
        with part.open("r+b" if part.exists() else "wb") as out:
            out.seek(start)
            out.truncate()
            while (chunk := read()) and not stop.is_set():
                out.write(chunk)


def _accept(file: RemoteFile, part: Path, target: Path, info: ModelInfo) -> None:
    if file.sha256:
        with part.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        if found != file.sha256:
            part.unlink()
            raise DownloadError(
                f"{info.name}: {file.path} arrived damaged (its SHA-256 is not the source's) and was deleted: try again"
            )
    os.replace(part, target)


def _name(partial: Path, target: Path) -> None:
    """Give a finished folder its name; an older one of that name goes."""
    (partial / ".lock").unlink()
    put(partial, target)


def _bytes_there(partial: Path, listing: Listing) -> int:
    total = 0
    for file in listing.files:
        for path in (partial / file.path, _part(partial / file.path)):
            with contextlib.suppress(OSError):
                total += path.stat().st_size
    return total


def _part(target: Path) -> Path:
    return target.with_name(target.name + PART)
