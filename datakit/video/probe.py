"""What a container says about its best video stream, before any frame but the first is decoded."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import PurePosixPath

from datakit.video.frame import Picture
from datakit.video.reader import VideoReader
from datakit.video.uri import IMAGE_SUFFIXES

# AVColorTransferCharacteristic and AVColorPrimaries, libavutil/pixfmt.h: the names FFmpeg prints.
_TRANSFERS = {
    1: "bt709",
    4: "gamma22",
    5: "gamma28",
    6: "smpte170m",
    7: "smpte240m",
    8: "linear",
    11: "iec61966-2-4",
    13: "iec61966-2-1",
    14: "bt2020-10",
    15: "bt2020-12",
    16: "smpte2084",
    18: "arib-std-b67",
}
_PRIMARIES = {
    1: "bt709",
    4: "bt470m",
    5: "bt470bg",
    6: "smpte170m",
    7: "smpte240m",
    8: "film",
    9: "bt2020",
    10: "smpte428",
    11: "smpte431",
    12: "smpte432",
    22: "jedec-p22",
}
_SPACES = {
    0: "gbr",
    1: "bt709",
    4: "fcc",
    5: "bt470bg",
    6: "smpte170m",
    7: "smpte240m",
    8: "ycgco",
    9: "bt2020nc",
    10: "bt2020c",
}
_RANGES = {1: "tv", 2: "pc"}


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """Header facts of a source; counts and times that only decoding can tell are not here.

    Sizes are in display pixels (rotation and pixel aspect applied), `fps` in frames per second as the
    container averages it (None when unknown), `bit_rate` in bits per second, colour fields are FFmpeg's
    names or None when untagged. `expected_s` is the header's duration.
    """

    kind: str  # "video" or "image"
    container: str
    codec: str
    profile: str | None
    pix_fmt: str
    bit_depth: int
    color_space: str | None
    color_range: str | None
    color_transfer: str | None
    color_primaries: str | None
    width: int
    height: int
    rotation: int
    fps: float | None
    time_base: Fraction
    stream: int
    bit_rate: int | None
    has_audio: bool
    expected_s: float | None


def describe(reader: VideoReader, first: Picture, size: int | None) -> VideoInfo:
    """Facts of an open reader, given its first decoded picture.

    Args:
        size: bytes of the source, for a bit rate where the container has none.
    """
    stream, container = reader.stream, reader.container
    frame, geometry = first.frame, first.geometry
    seconds = _seconds(reader)
    image = _is_image(reader)
    return VideoInfo(
        kind="image" if image else "video",
        container=container.format.name,
        codec=stream.codec_context.codec.canonical_name,
        profile=stream.profile,
        pix_fmt=frame.format.name,
        bit_depth=frame.format.components[0].bits,
        color_space=_SPACES.get(int(frame.colorspace)),
        color_range=_RANGES.get(int(frame.color_range)),
        color_transfer=_TRANSFERS.get(int(frame.color_trc)),
        color_primaries=_PRIMARIES.get(int(frame.color_primaries)),
        width=geometry.width,
        height=geometry.height,
        rotation=geometry.rotation,
        fps=None if image else float(stream.average_rate or stream.guessed_rate or 0) or None,
        time_base=reader.time_base,
        stream=stream.index,
        bit_rate=None if image else _bit_rate(reader, size, seconds),
        has_audio=len(container.streams.audio) > 0,
        expected_s=seconds,
    )


def probe(uri: str, size: int | None = None) -> VideoInfo:
    """Open `uri`, decode one frame and describe it.

    Raises:
        MediaError: what stands in the way, with its kind.
    """
    with VideoReader(uri) as reader:
        return describe(reader, next(reader.frames()), size)


def _is_image(reader: VideoReader) -> bool:
    """A still: an image demuxer, or an image suffix on a one-frame file (AVIF and HEIC are mp4 inside)."""
    name = reader.container.format.name
    if name.endswith("_pipe") or name == "image2":
        return True
    return PurePosixPath(reader.uri).suffix.lower() in IMAGE_SUFFIXES and reader.stream.frames <= 1


def _seconds(reader: VideoReader) -> float | None:
    """Duration of the video stream by its header; the container's when nothing else is inside."""
    stream, container = reader.stream, reader.container
    if stream.duration:
        return float(stream.duration * reader.time_base)
    # Matroska counts from zero, whenever the first frame is shown.
    start = float((stream.start_time or 0) * reader.time_base)
    if tag := stream.metadata.get("DURATION"):  # 00:00:24.023000000
        hours, minutes, seconds = tag.split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds) - start
    if container.duration and len(container.streams) == 1:
        return container.duration / 1e6 - start
    return None


def _bit_rate(reader: VideoReader, size: int | None, seconds: float | None) -> int | None:
    """Of the video stream; else the container's, else size over duration (both include the sound)."""
    rate = reader.stream.codec_context.bit_rate or reader.container.bit_rate
    if rate:
        return rate
    return int(size * 8 / seconds) if size and seconds else None
