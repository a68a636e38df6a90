"""Frames of a source: all of them in order, those of a span, or those at chosen times.

One generator (`VideoReader.frames`) defines which frames a video has, and the sparse readers yield the
same ones: presentation order, strictly rising timestamps, damaged packets skipped and remembered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Self

import av
import av.error
from av.codec.context import ThreadType

from datakit.errors import ErrorKind, MediaError
from datakit.identity import Span
from datakit.video.container import media_errors, open_container, pts_of, video_stream
from datakit.video.frame import Geometry, Picture

GRID_S = Fraction(1, 2)
"""Spacing of the candidate grid in seconds: measurements and image stages look at these frames."""
PAIR_GAP_S = Fraction(40, 1000)
"""A motion pair is a grid frame and the first frame at least this much later."""
CONCEALING = frozenset({"h264", "hevc"})
"""Decoders that paint over damaged slices in silence unless told to report them."""
SEEK_AHEAD_S = 4.0
"""Sparse reading decodes on instead of seeking when the next target is at most this far ahead."""


@dataclass(slots=True)
class Damage:
    """A stretch of the stream that cannot be trusted: from a packet that failed to the next key frame.

    `start_pts` and `end_pts` are None where unknown or open.
    """

    start_pts: int | None
    end_pts: int | None
    message: str

    def touches(self, span: Span) -> bool:
        starts_before = self.start_pts is None or self.start_pts < span.end_pts
        ends_after = self.end_pts is None or self.end_pts > span.start_pts
        return starts_before and ends_after


@dataclass
class VideoReader:
    """An open video stream. Use as a context manager.

    Attributes:
        uri: path or fsspec URL.
        stream_index: stream to read; the best one when None.
        threads: decoder threads.
        damage: stretches that could not be decoded, so far.
    """

    uri: str
    stream_index: int | None = None
    threads: int = 1
    damage: list[Damage] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._opened = open_container(self.uri)
        self.container = self._opened.__enter__()
        try:
            with media_errors(self.uri):
                self.stream = self._choose_stream()
                context = self.stream.codec_context
                context.thread_type = ThreadType.FRAME
                context.thread_count = self.threads
                if context.name in CONCEALING:
                    context.options = {"err_detect": "explode"}
        except BaseException:
            self._opened.__exit__(None, None, None)
            raise
        assert self.stream.time_base is not None, "streams that are read have one"
        self.time_base = Fraction(self.stream.time_base)
        self._pixel_aspect = float(self.stream.sample_aspect_ratio or 1) or 1.0
        self._geometry: tuple[tuple[Any, ...], Geometry] | None = None
        return self

    def __exit__(self, *raised: Any) -> None:
        self._opened.__exit__(*raised)

    def frames(self) -> Iterator[Picture]:
        """All frames from the current position on, in presentation order.

        Raises:
            MediaError: when not a single frame decodes.
        """
        last: int | None = None
        for index, frame in enumerate(self._raw_frames()):
            yield self._picture(frame, index)
            last = index
        if last is None:
            reason = self.damage[0].message if self.damage else "the stream holds no frames"
            raise MediaError(ErrorKind.DECODE, f"no frame could be decoded: {reason}")

    def since(self, pts: int) -> Iterator[Picture]:
        """The frames with `pts` or later, exactly those that `frames` yields there; `index` is -1."""
        for picture in self._from(pts):
            if picture.pts >= pts:
                yield picture

    def span(self, span: Span) -> Iterator[Picture]:
        """The frames with `start_pts <= pts < end_pts`."""
        for picture in self.since(span.start_pts):
            if picture.pts >= span.end_pts:
                return
            yield picture

    def at(self, targets: Iterable[int]) -> Iterator[tuple[int, Picture]]:
        """For each rising target PTS, (target, the first frame at or after it); nothing past the end."""
        ahead = int(SEEK_AHEAD_S / self.time_base)
        source: Iterator[Picture] = iter(())
        current: Picture | None = None
        for target in targets:
            if current is None or target > current.pts + ahead:
                source = self.since(target)
                current = next(source, None)
            while current is not None and current.pts < target:
                current = next(source, None)
            if current is None:
                return
            yield target, current

    def key_frame_before(self, pts: int) -> Picture | None:
        """The key frame that seeking to `pts` lands on; None where seeking is not exact."""
        try:
            self._seek(pts)
            frame = next(self._raw_frames(), None)
        except av.error.FFmpegError:
            return None
        if frame is None or not frame.key_frame or pts_of(frame) > pts:
            return None
        return self._picture(frame, -1)

    def _choose_stream(self) -> av.VideoStream:
        if self.stream_index is None:
            return video_stream(self.container)
        if self.stream_index >= len(self.container.streams):
            raise MediaError(ErrorKind.SOURCE_CHANGED, f"stream {self.stream_index} is gone")
        stream = self.container.streams[self.stream_index]
        assert isinstance(stream, av.VideoStream), "clips are of video streams"
        return stream

    def _from(self, pts: int) -> Iterator[Picture]:
        """Frames from a key frame at or before `pts`; from the beginning where seeking fails or overshoots."""
        for strategy in (lambda: self._seek(pts), lambda: self._seek(pts - int(10 / self.time_base)), self._rewind):
            try:
                strategy()
                frames = self._raw_frames()
                first = next(frames, None)
            except (av.error.FFmpegError, MediaError):
                continue
            if first is not None and (pts_of(first) <= pts or strategy == self._rewind):
                yield self._picture(first, -1)
                for frame in frames:
                    yield self._picture(frame, -1)
                return

    def _seek(self, pts: int) -> None:
        self.container.seek(pts, stream=self.stream, backward=True)

    def _rewind(self) -> None:
        """Reopen: some files decode cleanly in order but cannot seek at all."""
        self.__exit__(None, None, None)
        self.__enter__()

    def _raw_frames(self) -> Iterator[av.VideoFrame]:
        """Decoded frames with strictly rising timestamps."""
        last: int | None = None
        step = max(1, round(1 / Fraction(self.stream.average_rate or 25) / self.time_base))
        for frame in self._decode_packets(step):
            if frame.pts is None:  # raw streams carry no timestamps
                frame.pts = 0 if last is None else last + step
            if last is not None and frame.pts <= last:
                self.damage.append(Damage(frame.pts, last + 1, "timestamp does not rise"))
                continue
            if frame.is_corrupt:
                self._note_damage(frame.pts, "frame refers to missing data")
            elif frame.key_frame:
                self._end_damage(frame.pts)
            last = frame.pts
            yield frame

    def _decode_packets(self, step: int) -> Iterator[av.VideoFrame]:
        packets = self.container.demux(self.stream)
        while True:
            try:
                packet = next(packets, None)
            except (av.error.FFmpegError, OSError) as e:
                self._note_damage(None, f"reading stopped: {e}")
                packet = None
            if packet is None:
                return
            try:
                yield from packet.decode()
            except av.error.MemoryError as e:
                raise MediaError(ErrorKind.OUT_OF_MEMORY, str(e)) from e
            except av.error.DecoderNotFoundError as e:
                raise MediaError(ErrorKind.UNSUPPORTED, str(e)) from e
            except av.error.FFmpegError as e:
                if packet.size:  # the flushing packet has none; threads report a packet late
                    self._note_damage(None if packet.pts is None else packet.pts - self.threads * step, str(e))

    def _note_damage(self, pts: int | None, message: str) -> None:
        if not self.damage or self.damage[-1].end_pts is not None:
            self.damage.append(Damage(pts, None, message))

    def _end_damage(self, pts: int) -> None:
        if self.damage and self.damage[-1].end_pts is None and (self.damage[-1].start_pts or 0) < pts:
            self.damage[-1].end_pts = pts

    def _picture(self, frame: av.VideoFrame, index: int) -> Picture:
        key = (frame.format.name, frame.width, frame.height, frame.colorspace, frame.color_range, frame.rotation)
        if self._geometry is None or self._geometry[0] != key:
            self._geometry = key, Geometry.of(frame, self._pixel_aspect)
        return Picture(frame, self._geometry[1], pts_of(frame), frame.duration or 0, index)
