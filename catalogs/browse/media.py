"""Pictures and films of clips: where they lie, whether a browser can play them, thumbnails, and a transcode where it
cannot.

Only files that the catalog records are opened: addresses of ok videos, and clip files inside the catalog's own folder.
"""

from __future__ import annotations

import math
import os
import tempfile
import threading
from fractions import Fraction
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import polars as pl
from cachetools import LRUCache, TTLCache, cachedmethod

from catalogs.tables.catalog import Catalog
from datakit.errors import DatakitError, ErrorKind, MediaError
from datakit.video.uri import is_remote, local_path, open_bytes
from datakit.web.http_range import Served

if TYPE_CHECKING:
    from catalogs.browse.clip_index import Index

THUMB_BYTES = 96 << 20
TRANSCODE_BYTES = 1 << 30
LONGEST_TRANSCODE_S = 60.0
"""More of a clip is not transcoded: people look, and wait."""
RETRY_S = 20.0
"""A source that could not be read is not tried again for so long."""
SIDES = (320, 1280)
CONTAINERS = ("mov", "mp4", "webm", "matroska")
CODECS = frozenset({"h264", "vp8", "vp9", "av1"})
PIXELS = frozenset({"yuv420p", "yuvj420p"})
PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".avif", ".bmp"})
"""What browsers show without help; Chromium, Firefox and Safari agree on these."""
SPAN = ["clip_id", "stream", "start_pts", "end_pts", "time_base", "shard", "start_s", "end_s", "fps"]


class NotHere(DatakitError):
    """Something that this catalog does not have, or that must not be shown."""


class Films(LRUCache[str, Path]):
    """Transcoded clips by id, up to so many bytes: the file of one that is dropped is deleted."""

    def popitem(self) -> tuple[str, Path]:
        clip_id, path = super().popitem()
        path.unlink(missing_ok=True)
        return clip_id, path


class Media:
    """Files behind an index. Use as a context manager: its folder of transcoded clips goes at the end."""

    def __init__(self, index: Index):
        self.index = index
        self._caching = threading.Lock()
        self._thumbs: LRUCache[tuple, bytes] = LRUCache(THUMB_BYTES, len)
        self._failed: TTLCache[str, MediaError] = TTLCache(4096, RETRY_S)
        self._starts: LRUCache[str, float] = LRUCache(4096)
        self._addresses: LRUCache[str, str] = LRUCache(4096)
        self._folder = tempfile.TemporaryDirectory(prefix="datakit-browse-")
        self._films = Films(TRANSCODE_BYTES, lambda path: path.stat().st_size)
        self._cutting = threading.Lock()

    def close(self) -> None:
        self._folder.cleanup()

    def of_clip(self, clip_id: str) -> dict:
        """How the page shows a clip: `kind` (video, image), `src`, `start` and `end` in the time that a player counts,
        and `fallback`, the transcode, for browsers that refuse `src`."""
        row = self._row(clip_id)
        clip, video = self.index.take([row], SPAN).row(0, named=True), self.index.video_at(row)
        film = f"/play/{clip_id}.mp4"
        whole = {"kind": "video", "src": film, "fallback": None, "start": 0.0, "end": None, "of": "transcode"}
        if video["kind"] == "image":
            return {
                "kind": "image",
                "src": self._picture(clip_id, video),
                "fallback": f"/thumb/{clip_id}.jpg?side=1280",
            }
        if self.index.has_path(row) and not self._is_here(video):
            return {**whole, "src": f"/file/{clip_id}", "fallback": film, "of": "clip file"}
        if not _plays(video):
            return whole
        begin = self._start_of(video)
        base = Fraction(clip["time_base"])
        start, end = (float(pts * base) - begin for pts in (clip["start_pts"], clip["end_pts"]))
        return {
            "kind": "video",
            "src": f"/video/{video['video_id']}",
            "fallback": film,
            "of": "source",
            "start": max(0.0, math.ceil(start * 1e6) / 1e6),
            "end": math.floor(end * 1e6) / 1e6,
        }

    def video(self, video_id: str) -> Served:
        """The source of an ok video."""
        facts = self.index.video(video_id)
        if facts is None:
            raise NotHere("no such video")
        return served(self._address(facts), f"{video_id}")

    def clip_file(self, clip_id: str) -> Served:
        """The file of a clip that has one of its own, if it lies inside the catalog."""
        row = self._row(clip_id)
        path = self._record(row, "clips", ["path"])["path"] if self.index.has_path(row) else None
        if path is None:
            raise NotHere("this clip has no file of its own")
        return served(inside(self.index.catalog, path), clip_id)

    def thumbnail(self, clip_id: str, side: int) -> bytes:
        """A JPEG of the middle of a clip."""
        if side not in SIDES:
            raise NotHere(f"thumbnails have sides of {' or '.join(map(str, SIDES))}")
        row = self._row(clip_id)
        with self._caching:
            error = self._failed.get(clip_id)
        if error is not None:  # the page asks again, for the reason
            raise error
        return self._thumbnail(clip_id, side, row)

    @cachedmethod(
        attrgetter("_thumbs"), key=lambda self, clip_id, side, row: (clip_id, side), lock=attrgetter("_caching")
    )
    def _thumbnail(self, clip_id: str, side: int, row: int) -> bytes:
        from datakit.video.thumbnail import clip_thumbnail

        clip = self.index.take([row], SPAN).row(0, named=True)
        try:
            return clip_thumbnail(self.index.catalog.root, {**clip, **self._place(row)}, side)
        except MediaError as e:
            with self._caching:
                self._failed[clip_id] = e
            raise

    def film(self, clip_id: str) -> Path:
        """The clip as H.264 in MP4; one at a time, as encoding takes all there is."""
        row = self._row(clip_id)
        with self._cutting:
            return self._transcode(clip_id, row)

    @cachedmethod(attrgetter("_films"), key=lambda self, clip_id, row: clip_id)
    def _transcode(self, clip_id: str, row: int) -> Path:
        from datakit.identity import Span
        from datakit.video.cut import cut
        from datakit.video.reader import VideoReader

        clip, place = self.index.take([row], SPAN).row(0, named=True), self._place(row)
        from_file = place["path"] is not None and not self._is_here(self.index.video_at(row))
        uri = os.path.join(self.index.catalog.root, place["path"]) if from_file else place["uri"]
        path = Path(self._folder.name) / f"{clip_id}.mp4"
        with VideoReader(uri, None if from_file else clip["stream"], threads=2) as reader:
            base = reader.time_base
            start = 0 if from_file else clip["start_pts"]
            length = (clip["end_s"] - clip["start_s"] + 1) / base if from_file else clip["end_pts"] - clip["start_pts"]
            cut(reader, Span(start, start + max(1, int(min(length, LONGEST_TRANSCODE_S / base))), base), path)
        return path

    def _row(self, clip_id: str) -> int:
        row = self.index.row_of(clip_id)
        if row is None:
            raise NotHere("no such clip")
        return row

    def _place(self, row: int) -> dict:
        """`uri` of the source and `path` of the clip's file, both checked."""
        path = self._record(row, "clips", ["path"])["path"] if self.index.has_path(row) else None
        if path is not None:
            inside(self.index.catalog, path)
        return {"uri": self._address(self.index.video_at(row)), "path": path}

    def _address(self, video: dict) -> str:
        """Where the video is: the first of its addresses; the first local one that is there, if it is not."""
        if is_remote(video["uri"]) or os.path.isfile(local_path(video["uri"])):
            return video["uri"]

        return self._first_reachable(video)

    @cachedmethod(attrgetter("_addresses"), key=lambda self, video: video["video_id"], lock=attrgetter("_caching"))
    def _first_reachable(self, video: dict) -> str:
        found = self._read("videos", pl.col("video_id") == video["video_id"], video["shard"], ["uris"])["uris"] or []
        return next(
            (u["uri"] for u in found if is_remote(u["uri"]) or os.path.isfile(local_path(u["uri"]))), video["uri"]
        )

    def _is_here(self, video: dict) -> bool:
        uri = self._address(video)
        return is_remote(uri) or os.path.isfile(local_path(uri))

    def _picture(self, clip_id: str, video: dict) -> str:
        shown = Path(video["uri"]).suffix.lower() in PICTURES and self._is_here(video)
        return f"/video/{quote(video['video_id'])}" if shown else f"/thumb/{clip_id}.jpg?side=1280"

    @cachedmethod(attrgetter("_starts"), key=lambda self, video: video["video_id"], lock=attrgetter("_caching"))
    def _start_of(self, video: dict) -> float:
        """What players call 0, in seconds of the file's own time: the container's start where that is before 0, else 0.

        Players do not move what begins late: the HTML standard ("offsets into the media resource") has them count from
        the media's own zero, and Chromium's FFmpegDemuxerStream rebases negative starts only.
        """
        from datakit.video.container import open_container

        try:
            with open_container(self._address(video)) as container:
                return min(0, container.start_time or 0) / 1e6
        except MediaError:  # the player will meet it too, and says so
            return 0.0

    def _record(self, row: int, table: str, columns: list[str]) -> dict:
        clip = self.index.take([row], ["clip_id", "shard"]).row(0, named=True)
        return self._read(table, pl.col("clip_id") == clip["clip_id"], clip["shard"], columns)

    def _read(self, table: str, which: pl.Expr, shard: str, columns: list[str]) -> dict:
        """One row from the tables; the shard keeps the reading to a few files."""
        catalog, versions = self.index.catalog, self.index.versions
        source = catalog.finished_clips(versions) if table == "clips" else catalog.scan(table, versions[table])
        with catalog.reading():
            return (
                source.filter((pl.col("shard") == shard) & which).select(columns).head(1).collect().row(0, named=True)
            )


def inside(catalog: Catalog, path: str) -> str:
    """The address of a file of the catalog.

    Raises:
        NotHere: it would lie outside the catalog's folder, by dots or by links.
    """
    if path.startswith("/") or "://" in path or ".." in Path(path).parts:
        raise NotHere("the file of this clip would lie outside the catalog")
    if not catalog.is_local:
        return f"{catalog.root}/{path}"
    root, file = os.path.realpath(catalog.root), os.path.realpath(os.path.join(catalog.root, path))
    if os.path.commonpath([root, file]) != root:
        raise NotHere("the file of this clip lies outside the catalog")
    return file


def served(uri: str, tag: str) -> Served:
    """What to answer with for a file.

    Args:
        tag: identity of the content.

    Raises:
        MediaError: it is not there, or no plain file.
    """
    if is_remote(uri):
        return _served_remote(uri, tag)
    path = local_path(uri)
    try:
        found = os.stat(path)
    except OSError as e:
        raise MediaError(ErrorKind.UNREADABLE, f"cannot read {path}: {e.strerror}") from e
    if not os.path.isfile(path):
        raise MediaError(ErrorKind.UNREADABLE, f"{path} is no file")
    return Served(
        path, found.st_size, f"{tag}/{found.st_size}/{found.st_mtime_ns}", found.st_mtime, lambda: open(path, "rb")
    )


def _served_remote(uri: str, tag: str) -> Served:
    import fsspec

    try:
        fs, inner = fsspec.core.url_to_fs(uri)
        info = fs.info(inner)
    except (OSError, ImportError, ValueError) as e:
        raise MediaError(ErrorKind.UNREADABLE, f"cannot read {uri}: {str(e).splitlines()[0]}") from e
    mark = info.get("ETag") or info.get("etag") or info.get("mtime") or ""
    return Served(inner, info["size"], f"{tag}/{info['size']}/{mark}", None, lambda: open_bytes(uri))


def _plays(video: dict) -> bool:
    """Whether browsers play the source itself, as far as its facts tell; the page falls back if one does not."""
    container = any(part in CONTAINERS for part in (video["container"] or "").split(","))
    return container and video["codec"] in CODECS and (video["pix_fmt"] is None or video["pix_fmt"] in PIXELS)
