"""Where a video lies: an address, what can be seen without reading it, and the identity of what it holds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from datakit.errors import ErrorKind, MediaError
from datakit.identity import unreadable_id, video_id
from datakit.video.uri import is_remote, local_path, open_bytes


@dataclass(frozen=True)
class Source:
    """An address with what is known without reading it.

    Attributes:
        uri: absolute path or URL.
        size: bytes, None when it cannot be seen.
        etag: changes when the content does: the store's ETag, or the modification time of a local file.
        attributes: columns of `videos` that came with the list.
        problem: why it cannot be read, if so.
    """

    uri: str
    size: int | None = None
    etag: str = ""
    attributes: dict[str, str] = field(default_factory=dict)
    problem: MediaError | None = None


def look_at(address: str, attributes: dict[str, str] | None = None) -> Source:
    """The source at a path or URL; one that is not there has a `problem`."""
    if not is_remote(address):
        return look_at_file(local_path(address), attributes)
    import fsspec

    try:
        fs, inner = fsspec.core.url_to_fs(address)
        return listed_object(address, fs.info(inner), attributes)
    except Exception as e:  # each store has its own exceptions
        problem = MediaError(ErrorKind.UNREADABLE, f"cannot read {address}: {e}"[:500])
        return Source(address, attributes=attributes or {}, problem=problem)


def look_at_file(path: str, attributes: dict[str, str] | None = None) -> Source:
    """See `look_at`, for a local path."""
    uri = os.path.abspath(path)
    try:
        stat = os.stat(uri)
    except OSError as e:
        problem = MediaError(ErrorKind.UNREADABLE, f"cannot read {uri}: {e.strerror}")
        return Source(uri, attributes=attributes or {}, problem=problem)
    return Source(uri, stat.st_size, f"mtime-{stat.st_mtime_ns}", attributes or {})


def listed_object(uri: str, info: dict[str, Any], attributes: dict[str, str] | None = None) -> Source:
    """The source that an object store's listing describes."""
    etag = (
        info.get("ETag")
        or info.get("etag")
        or info.get("md5Hash")
        or info.get("LastModified")
        or info.get("created")
        or ""
    )
    return Source(uri, info.get("size"), str(etag).strip('"'), attributes or {})


def identify(source: Source) -> tuple[str, MediaError | None]:
    """The content identity of a source, by reading at most 2.4 MB of it.

    Returns:
        its id; and why it cannot be processed, if that is already clear (then the id may stand for its
        address only).
    """
    if source.problem is not None:
        return unreadable_id(source.uri), source.problem
    try:
        with open_bytes(source.uri) as file:
            size = source.size if source.size is not None else file.seek(0, os.SEEK_END)
            identity = video_id(file, size)
    except Exception as e:  # object stores raise errors of their own making
        return unreadable_id(source.uri), MediaError(ErrorKind.UNREADABLE, f"cannot read {source.uri}: {e}"[:500])
    if size == 0:
        return identity, MediaError(ErrorKind.EMPTY, "the file is empty")
    return identity, None


def present(addresses: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first of a video's addresses where there is a file (or an object, which is not asked); else the first.

    A video whose addresses all hold other content now has none left.
    """
    candidates = addresses or [{"uri": "no address that is left", "size": None}]
    return next((a for a in candidates if is_remote(a["uri"]) or os.path.exists(local_path(a["uri"]))), candidates[0])


def check_content(uri: str, size: int | None, expected: str) -> None:
    """Raises:
    MediaError: `source_changed` when the address holds other content than when it was ingested.
    """
    try:
        with open_bytes(uri) as file:
            found = video_id(file, size if size is not None else file.seek(0, 2))
            grown = file.seek(0, 2) != size if size is not None else False
    except OSError as e:
        raise MediaError(
            ErrorKind.UNREADABLE, f"cannot read {uri}: {e.strerror or e} (moved? `datakit catalog relink`)"
        ) from e
    if grown or found != expected:
        raise MediaError(ErrorKind.SOURCE_CHANGED, f"{uri} holds other content than when it was ingested")
