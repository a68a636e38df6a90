"""Opening local and remote sources with PyAV, and turning its errors into quarantine kinds."""

from __future__ import annotations

import errno
from contextlib import contextmanager
from typing import Iterator

import av
import av.container
import av.error
import av.video.stream

from datakit.errors import ErrorKind, MediaError

VIDEO_SUFFIXES = frozenset(
    ".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .m2v .mts .m2ts .ts .vob .flv .f4v .wmv .asf .ogv .ogg .3gp .3g2 "
    ".mxf .y4m .dv .rm .rmvb .gif .h264 .264 .h265 .265 .hevc .av1 .ivf .obu".split()
)
IMAGE_SUFFIXES = frozenset(".jpg .jpeg .png .webp .bmp .tif .tiff .avif .heic .jxl .ppm .pgm".split())


def is_remote(uri: str) -> bool:
    return "://" in uri and not uri.startswith("file://")


def local_path(uri: str) -> str:
    """The file system path of a local URI (plain path or `file://`)."""
    return uri.removeprefix("file://")


@contextmanager
def open_container(uri: str) -> Iterator[av.container.InputContainer]:
    """Open `uri` (path, `file://` or any fsspec URL) for reading.

    Raises:
        MediaError: unreadable, empty or not media.
    """
    handle = None
    try:
        with media_errors(uri):
            if is_remote(uri) or "%" in uri:  # FFmpeg would take % for an image sequence pattern
                handle = open_bytes(uri)
                container = av.open(handle)
            else:
                # `file:` keeps names with colons or leading dashes from being read as protocols;
                # the whitelist keeps playlists from opening anything else.
                container = av.open("file:" + local_path(uri), options={"protocol_whitelist": "file"})
        with container:
            yield container
    finally:
        if handle is not None:
            handle.close()


def open_bytes(uri: str):
    """A seekable binary file for `uri`; remote ones through fsspec with block caching."""
    if not is_remote(uri):
        return open(local_path(uri), "rb")
    import fsspec

    return fsspec.open(uri, "rb", block_size=4 << 20).open()


def video_stream(container: av.container.InputContainer) -> av.video.stream.VideoStream:
    """The stream FFmpeg rates best, cover art excluded.

    Raises:
        MediaError: `no_video` or `unsupported`.
    """
    moving = [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]
    if not moving:
        kinds = sorted({s.type for s in container.streams}) or ["nothing"]
        raise MediaError(ErrorKind.NO_VIDEO, f"no video stream (the file holds: {', '.join(kinds)})")
    best = container.streams.best("video")
    stream = best if best in moving else moving[0]
    if stream.codec_context is None:
        raise MediaError(ErrorKind.UNSUPPORTED, f"no decoder for video stream {stream.index}")
    return stream


@contextmanager
def media_errors(what: str) -> Iterator[None]:
    """Translate the exceptions of PyAV and of the file system into `MediaError`."""
    try:
        yield
    except MediaError:
        raise
    except av.error.InvalidDataError as e:
        raise MediaError(ErrorKind.NOT_MEDIA, f"not a media file FFmpeg can read: {_reason(e)}") from e
    except (av.error.DecoderNotFoundError, av.error.PatchWelcomeError) as e:
        raise MediaError(ErrorKind.UNSUPPORTED, _reason(e)) from e
    except MemoryError as e:
        raise MediaError(ErrorKind.OUT_OF_MEMORY, f"out of memory: {e}") from e
    except OSError as e:  # PyAV's errors for the file system derive from it too
        if e.errno == errno.ENOMEM:
            raise MediaError(ErrorKind.OUT_OF_MEMORY, f"out of memory: {_reason(e)}") from e
        kind = ErrorKind.UNREADABLE if _is_filesystem_error(e) else ErrorKind.NOT_MEDIA
        raise MediaError(kind, f"cannot read {what}: {_reason(e)}") from e


def _is_filesystem_error(e: OSError) -> bool:
    return not isinstance(e, av.error.FFmpegError) or e.errno in (errno.ENOENT, errno.EACCES, errno.EIO, errno.EISDIR)


def _reason(e: Exception) -> str:
    return getattr(e, "strerror", None) or str(e)
