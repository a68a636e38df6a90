"""Clip files from spans: re-encoded exactly, or copied as far as key frames allow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import av
import av.error

from datakit.errors import ErrorKind, MediaError
from datakit.identity import Span
from datakit.video.container import pts_of
from datakit.video.reader import VideoReader
from datakit.video.writer import VideoWriter

if TYPE_CHECKING:
    from datakit.video.container import VideoPacket

REORDER = 32
"""Packets looked at behind a span's end: no codec delays a frame by more."""
_MP4_CODECS = frozenset({"h264", "hevc", "av1", "vp9", "mpeg4"})


@dataclass(frozen=True, slots=True)
class Copied:
    """Frames in a copied file, and frames of the span missing at its start and end."""

    frames: int
    lost_start: int
    lost_end: int


def cut(reader: VideoReader, span: Span, path: str | Path) -> int:
    """Re-encode exactly the frames of `span` to `path` (.mp4), the first at time 0; gives their number.

    Raises:
        MediaError: nothing decodes there, or the encoder fails.
    """
    writer: VideoWriter | None = None
    frames = 0
    try:
        for picture in reader.span(span):
            if writer is None:
                rate = float(reader.stream.average_rate or 25)
                writer = VideoWriter(path, picture.geometry.width, picture.geometry.height, span.time_base, rate)
            writer.write(picture, picture.pts - span.start_pts)
            frames += 1
    except BaseException as e:
        if writer is not None:
            writer.__exit__(type(e), e, None)
        raise
    if writer is None:
        raise MediaError(ErrorKind.DECODE, "no frame of the clip could be decoded", "clips")
    writer.__exit__(None, None, None)
    return frames


def copy_suffix(reader: VideoReader) -> str:
    """`.mp4` where it can hold the codec, else `.mkv`."""
    return ".mp4" if reader.stream.codec_context.codec.canonical_name in _MP4_CODECS else ".mkv"


def copy(reader: VideoReader, span: Span, path: str | Path) -> Copied | None:
    """Copy the packets of `span` to `path` without decoding.

    A copy can begin at a key frame only and must not hold packets shown after the span; so it may lose
    frames at both ends, but never holds a frame from outside. None when the span holds no key frame.
    """
    packets = _packets(reader, span)
    inside = [p for p in packets if pts_of(p) in span]
    start = next((i for i, p in enumerate(packets) if p.is_keyframe and pts_of(p) in span), None)
    if start is None:
        return None
    first = pts_of(packets[start])
    stop = next((i for i in range(start, len(packets)) if pts_of(packets[i]) >= span.end_pts), len(packets))
    # Frames shown before the span's end but stored behind `stop` are lost, and all that follow them.
    end_pts = min([pts_of(p) for p in packets[stop:] if pts_of(p) >= first], default=span.end_pts)
    kept = [p for p in packets[start:stop] if first <= pts_of(p) < end_pts]
    with av.open(str(path), "w") as output:
        stream = output.add_stream_from_template(reader.stream)
        for packet in kept:
            packet.pts = pts_of(packet) - first
            if packet.dts is not None:
                packet.dts -= first
            packet.stream = stream
            output.mux(packet)
    lost_start = sum(1 for p in inside if p not in kept and pts_of(p) < first)
    return Copied(len(kept), lost_start, len(inside) - len(kept) - lost_start)


def _packets(reader: VideoReader, span: Span) -> list[VideoPacket]:
    """Packets in stored order, from the key frame before the span to where none of it can follow."""
    try:
        reader.container.seek(span.start_pts, stream=reader.stream, backward=True)
        packets: list[VideoPacket] = []
        behind = 0
        for packet in reader.container.demux(reader.stream):
            if packet.pts is None:
                continue
            packets.append(packet)
            behind = behind + 1 if packet.pts >= span.end_pts else 0
            if behind >= REORDER:
                break
        return packets
    except av.error.FFmpegError as e:
        raise MediaError(ErrorKind.DECODE, f"cannot copy: {e}", "clips") from e
