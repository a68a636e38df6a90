"""Opening local and remote sources with PyAV, and turning its errors into quarantine kinds."""

from __future__ import annotations

import errno
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

import av
import av.container
import av.error
import av.video.stream

from datakit.errors import ErrorKind, MediaError
from datakit.video.uri import is_remote, local_path, open_bytes

if TYPE_CHECKING:
    VideoPacket: TypeAlias = av.Packet[av.VideoStream]


@contextmanager
def open_container(uri: str) -> Generator[av.container.InputContainer]:
    """Open `uri` (path, `file://` or any fsspec URL) for reading.

    Raises:
        MediaError: unreadable, empty or not media.
    """
    handle = None
    try:
        with media_errors(uri):
            if is_remote(uri) or "%" in uri:  # FFmpeg would take % for an image sequence pattern
                handle = open_bytes(uri)
                container = av.open(handle, "r")
            else:
                # `file:` keeps names with colons or leading dashes from being read as protocols;
                # the whitelist keeps playlists from opening anything else.
                container = av.open("file:" + local_path(uri), "r", options={"protocol_whitelist": "file"})
        with container:
            yield container
    finally:
        if handle is not None:
            handle.close()


def pts_of(item: VideoPacket | av.VideoFrame) -> int:
    """The presentation time of a packet or frame that has one, in the stream's time base.

    Raises:
        MediaError: it has none.
    """
    if item.pts is None:
        raise MediaError(ErrorKind.DECODE, "a packet or frame without a time")
    return item.pts


def video_stream(container: av.container.InputContainer) -> av.video.stream.VideoStream:
    """The stream with the largest picture, then the highest bit rate, as FFmpeg picks; cover art excluded.

    Raises:
        MediaError: `no_video` or `unsupported`.
    """
    moving = [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]
    if not moving:
        kinds = sorted({s.type for s in container.streams}) or ["nothing"]
        raise MediaError(ErrorKind.NO_VIDEO, f"no video stream (the file holds: {', '.join(kinds)})")
    # PyAV has none where FFmpeg has no decoder; its stubs do not say so
    decodable = [s for s in moving if s.codec_context is not None]  # pyright: ignore[reportUnnecessaryComparison]
    if not decodable:
        raise MediaError(ErrorKind.UNSUPPORTED, f"no decoder for video stream {moving[0].index}")
    return max(
        decodable,
        key=lambda s: (s.codec_context.width * s.codec_context.height, s.codec_context.bit_rate or 0, -s.index),
    )


@contextmanager
def media_errors(what: str) -> Generator[None]:
    """Translate the exceptions of PyAV and of the file system into `MediaError`."""
    try:
        yield
    except MediaError:
        raise
    except av.error.InvalidDataError as e:
        raise MediaError(ErrorKind.NOT_MEDIA, f"not a media file FFmpeg can read: {_reason(e)}") from e
    except (av.error.DecoderNotFoundError, av.error.PatchWelcomeError) as e:
        raise MediaError(ErrorKind.UNSUPPORTED, _reason(e)) from e
    except av.error.FFmpegError as e:
        if not isinstance(e, OSError):
            raise MediaError(ErrorKind.NOT_MEDIA, f"cannot read {what}: {_reason(e)}") from e
        raise MediaError(_kind(e), f"cannot read {what}: {_reason(e)}") from e
    except MemoryError as e:
        raise MediaError(ErrorKind.OUT_OF_MEMORY, f"out of memory: {e}") from e
    except OSError as e:
        raise MediaError(_kind(e), f"cannot read {what}: {_reason(e)}") from e


def _kind(e: OSError) -> ErrorKind:
    if e.errno == errno.ENOMEM:
        return ErrorKind.OUT_OF_MEMORY
    of_file_system = e.errno in (errno.ENOENT, errno.EACCES, errno.EIO, errno.EISDIR)
    return ErrorKind.UNREADABLE if of_file_system or not isinstance(e, av.error.FFmpegError) else ErrorKind.NOT_MEDIA


def _reason(e: Exception) -> str:
    return getattr(e, "strerror", None) or str(e)
