"""Chosen frames of a span, cropped and scaled, decoding no more than they take.

A container's packets tell when its frames are shown before any is decoded. Decoding begins at the last key frame before
the first chosen frame, and leaves out frames that are not chosen and that no other frame refers to. Where packets and
frames do not agree (hidden frames, fields, damage) the span is decoded whole.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, cast

import av
import av.error
import av.filter
import cv2
import numpy as np

from datakit.errors import ErrorKind, MediaError
from datakit.identity import Span
from datakit.video.color import yuv_to_rgb
from datakit.video.container import media_errors, pts_of
from datakit.video.frame import Geometry, Picture
from datakit.video.reader import VideoReader

if TYPE_CHECKING:
    from datakit.video.container import VideoPacket

SCALER = "swscale-bicubic-1"
"""The resize filter: FFmpeg's bicubic (widened by the scale, so that shrinking does not alias; exact rounding, the same
bits on every processor), on Y'CbCr planes at native depth, before the colour matrix. The number changes when pixels
do."""
_SCALE_FLAGS = "bicubic+accurate_rnd+bitexact"
_SAME_COLOUR = "in_range=full:out_range=full:in_color_matrix=bt709:out_color_matrix=bt709"
"""Equal on both sides, so that codes pass as they are, whatever they mean."""
ONE_PICTURE_A_PACKET = frozenset({"h264", "hevc", "av1", "vp9", "mjpeg", "prores", "dnxhd", "ffv1"})
"""Codecs whose packets hold a frame each, shown at the packet's time. (VP8 has packets that are never shown, MPEG-4 in
AVI packets with two frames.)"""

Choose = Callable[[Sequence[int]], Sequence[int]]
"""Timestamps of a span's frames, rising -> indices of the frames wanted, rising."""


@dataclass(frozen=True, slots=True)
class Box:
    """Part of a picture, in display pixels; edges need not be whole."""

    x: float
    y: float
    width: float
    height: float


class ChosenFrames(VideoReader):
    """A `VideoReader` that picks frames of a span by their times."""

    def chosen(self, span: Span | None, choose: Choose, until: int | None = None) -> Iterator[tuple[int, Picture]]:
        """(place among the chosen, picture), rising. After a surprise inside the stream it begins again with place 0.

        Args:
            span: None is the whole file.
            choose: of the frames' timestamps. It may be asked twice.
            until: timestamp after which no frame can be chosen (an optimisation); None: the span's end.

        Raises:
            MediaError: `unreadable` when reading fails (it may pass), `decode` when a chosen frame lies on damaged
                data, and what `choose` raises.
        """
        end = min((e for e in (until, span.end_pts if span else None) if e is not None), default=None)
        start = span.start_pts if span else None
        if self.stream.codec_context.codec.canonical_name in ONE_PICTURE_A_PACKET:
            try:
                yield from self._by_packets(start, end, choose)
                return
            except _Disagreement:
                self._rewind()
        yield from self._by_decoding(start, end, choose)

    def _by_packets(self, start: int | None, end: int | None, choose: Choose) -> Iterator[tuple[int, Picture]]:
        packets = self._packets(start, end)
        times = sorted(pts_of(p) for p in packets if _in(pts_of(p), start, end) and not p.is_discard)
        if not times or len(set(times)) < len(times):
            raise _Disagreement
        wanted = {times[index]: place for place, index in enumerate(choose(times))}
        place = 0
        for frame in _decode(packets, wanted):
            if frame.pts not in wanted:
                continue
            if frame.is_corrupt or wanted[frame.pts] != place:
                raise _Disagreement
            yield place, self._picture(frame, -1)
            place += 1
        if place != len(wanted):
            raise _Disagreement

    def _packets(self, start: int | None, end: int | None) -> list[VideoPacket]:
        """In stored order, from the key frame at or before `start` until none shown before `end` can follow."""
        try:
            for back_s in (
                (0, 10) if start is not None else (None,)
            ):  # some containers seek past what they are asked for
                if back_s is not None and start is not None:
                    self._seek(start - int(back_s / self.time_base))
                packets = list(self._demuxed(end))
                key = next((i for i, p in enumerate(packets) if p.is_keyframe), None)
                if key is not None and (start is None or pts_of(packets[key]) <= start):
                    return packets[key:]
        except (av.error.FFmpegError, OSError) as e:
            raise _reading_error(e, self.uri) or _Disagreement from e
        raise _Disagreement

    def _demuxed(self, end: int | None) -> Iterator[VideoPacket]:
        for packet in self.container.demux(self.stream):
            if packet.size == 0:
                return
            if packet.pts is None or packet.is_corrupt:
                raise _Disagreement
            yield packet
            if end is not None and packet.dts is not None and packet.dts > end:
                return

    def _by_decoding(self, start: int | None, end: int | None, choose: Choose) -> Iterator[tuple[int, Picture]]:
        """As `VideoReader.span` gives them. Where seeking leads to damage that is not in the file, from its
        beginning."""
        try:
            yield from self._twice(lambda: _before(end, self.frames() if start is None else self.since(start)), choose)
        except MediaError as e:
            if e.kind != ErrorKind.DECODE or start is None:
                raise
            self._rewind()
            yield from self._twice(lambda: _before(end, (p for p in self.frames() if p.pts >= start)), choose)

    def _twice(self, decoded: Callable[[], Iterator[Picture]], choose: Choose) -> Iterator[tuple[int, Picture]]:
        """Once for the times, once for the chosen."""
        self.damage.clear()
        times = [picture.pts for picture in decoded()]
        if not times:
            raise MediaError(ErrorKind.DECODE, self.damage[0].message if self.damage else "no frame could be decoded")
        places = {times[index]: place for place, index in enumerate(choose(times))}
        self._rewind()
        self.damage.clear()
        found = 0
        for picture in _before(max(places) + 1, decoded()):
            if picture.pts in places:
                yield places[picture.pts], picture
                found += 1
        touched = [d for d in self.damage if d.touches(Span(min(places), max(places) + 1, self.time_base))]
        if touched or found < len(places):
            raise MediaError(
                ErrorKind.DECODE,
                f"damaged data: {touched[0].message}" if touched else "frames vanish between two reads",
            )

    def _note_damage(self, pts: int | None, message: str) -> None:
        """Called while an error is handled. One of reading, not of the data, is raised: it may pass."""
        if error := _reading_error(sys.exception(), self.uri):
            raise error
        super()._note_damage(pts, message)


class Scaler:
    """Cuts a box out of pictures and scales it to one size: full-range R'G'B', tags respected.

    Args:
        box: in display pixels; its edges are moved to the nearest whole chroma sample.
        height, width: of the result, oriented for display.
    """

    def __init__(self, box: Box, height: int, width: int):
        self._box, self._height, self._width = box, height, width
        self._made_for: tuple[Geometry, str] | None = None

    def rgb(self, picture: Picture, out: np.ndarray) -> None:
        """Args:
        out: uint8 [3, height, width] that is filled; each plane is contiguous, the planes may lie apart.
        """
        geometry, frame = picture.geometry, picture.frame
        if self._made_for != (geometry, frame.format.name):
            self._graph = self._build(geometry, frame.format)
            self._made_for = geometry, frame.format.name
        self._graph.push(frame.reformat(format=geometry.twin) if geometry.twin else frame)
        rgb = self._convert(cast(av.VideoFrame, self._graph.pull()), geometry)
        if geometry.rotation:
            out[:] = np.rot90(rgb, geometry.rotation // 90).transpose(2, 0, 1)
        else:
            cv2.split(rgb, list(out))

    def _convert(self, frame: av.VideoFrame, source: Geometry) -> np.ndarray:
        """[h, w, 3] of a scaled frame, by the colour of what it was scaled from. Overwritten by the next."""
        planes = Picture(frame, Geometry.of(frame), 0, 0, -1).planes()
        if source.layout == "rgb":
            return planes[0]
        if source.shift:
            planes = tuple(cv2.convertScaleAbs(p, alpha=1 / (1 << source.shift)) for p in planes)
        if source.layout == "gray":
            neutral = np.full(planes[0].shape, 128, np.uint8)
            planes = (planes[0], neutral, neutral)
        cv2.merge(planes, self._codes)
        return cv2.transform(self._codes, yuv_to_rgb(source.colour), self._rgb)

    def _build(self, g: Geometry, fmt: av.VideoFormat) -> av.filter.Graph:
        fmt = av.VideoFormat(g.twin or fmt.name, g.stored_width, g.stored_height)
        x, y, width, height = _stored_box(self._box, g, fmt)
        target = (self._height, self._width) if g.rotation % 180 else (self._width, self._height)
        # Kept: memory as large as this is given back to the system when it is freed, and comes again page by page.
        self._codes, self._rgb = (np.empty((target[1], target[0], 3), np.uint8) for _ in range(2))
        graph = av.filter.Graph()
        graph.threads = 1
        node = graph.add_buffer(width=g.stored_width, height=g.stored_height, format=fmt, time_base=Fraction(1, 1000))
        steps = (
            [("crop", f"{width}:{height}:{x}:{y}:exact=1")]
            if (width, height) != (g.stored_width, g.stored_height)
            else []
        )
        steps.append(("scale", f"{target[0]}:{target[1]}:flags={_SCALE_FLAGS}:{_SAME_COLOUR}"))
        steps.append(("format", _full_chroma(g, fmt)))
        for name, arguments in [*steps, ("buffersink", None)]:
            following = graph.add(name, arguments)
            node.link_to(following)
            node = following
        graph.configure()
        return graph


class _Disagreement(Exception):
    """Packets do not tell what decoding gives."""


def _decode(packets: Sequence[VideoPacket], wanted: Container[int]) -> Iterator[av.VideoFrame]:
    """The wanted frames, and some others, in presentation order."""
    context = packets[0].stream.codec_context
    needed = [i for i, p in enumerate(packets) if pts_of(p) in wanted]
    first = min(pts_of(packets[i]) for i in needed)
    key = max((i for i in range(needed[0] + 1) if packets[i].is_keyframe and pts_of(packets[i]) <= first), default=None)
    if key is None:
        raise _Disagreement
    context.open(strict=False)  # now: some decoders look at `skip_frame` only here
    try:
        for packet in packets[key : needed[-1] + 1]:
            if pts_of(packet) < pts_of(packets[key]):  # shown before the key frame, refers to what lies before it
                continue
            context.skip_frame = "DEFAULT" if pts_of(packet) in wanted else "NONREF"
            yield from packet.decode()
        yield from context.decode(None)
    except av.error.FFmpegError as e:
        raise _Disagreement from e
    finally:
        context.skip_frame = "DEFAULT"


def _before(end: int | None, pictures: Iterator[Picture]) -> Iterator[Picture]:
    for picture in pictures:
        if end is not None and picture.pts >= end:
            return
        yield picture


def _in(pts: int, start: int | None, end: int | None) -> bool:
    return (start is None or pts >= start) and (end is None or pts < end)


def _reading_error(error: BaseException | None, uri: str) -> MediaError | None:
    """What the file system or the network said, if `error` is that."""
    if not isinstance(error, OSError):
        return None
    try:
        with media_errors(uri):
            raise error
    except MediaError as e:
        return e if e.kind == ErrorKind.UNREADABLE else None


def _stored_box(box: Box, g: Geometry, fmt: av.VideoFormat) -> tuple[int, int, int, int]:
    """x, y, width, height of a display box in the stored picture, on whole chroma samples."""
    left, right = box.x / g.width, (box.x + box.width) / g.width
    top, bottom = box.y / g.height, (box.y + box.height) / g.height
    left, right, top, bottom = {
        0: (left, right, top, bottom),
        90: (1 - bottom, 1 - top, left, right),
        180: (1 - right, 1 - left, 1 - bottom, 1 - top),
        270: (top, bottom, 1 - right, 1 - left),
    }[g.rotation]
    x0, x1 = _whole(left, right, g.stored_width, 16 // fmt.chroma_width(16))
    y0, y1 = _whole(top, bottom, g.stored_height, 16 // fmt.chroma_height(16))
    return x0, y0, x1 - x0, y1 - y0


def _whole(low: float, high: float, size: int, step: int) -> tuple[int, int]:
    """Nearest multiples of `step` (the far edge, which may be odd, stays), at least one step apart."""
    start = min(max(0, round(low * size / step) * step), (size - 1) // step * step)
    end = size if round(high * size) >= size else round(high * size / step) * step
    return start, min(size, max(start + step, end))


def _full_chroma(g: Geometry, fmt: av.VideoFormat) -> str:
    """A format of the same codes in which every pixel has its own chroma."""
    if g.layout != "yuv":
        return fmt.name
    if fmt.name.startswith("yuvj"):
        return "yuvj444p"
    return f"yuv444p{8 + g.shift}le" if g.shift else "yuv444p"
