"""What a video is made from besides its text: pictures and stretches of videos, read exactly as training samples are
read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil

import numpy as np

from datakit.errors import ErrorKind, MediaError
from datakit.hashing import hash_hex
from datakit.identity import Span
from datakit.source import identify, look_at
from datakit.video.metadata import Rhythm
from datakit.video.probe import VideoInfo, describe
from datakit.video.reader import VideoReader
from datakit.video.sparse_reader import Box, ChosenFrames, Scaler
from trainer.data.sample_reader import SLACK_S, crop_box
from trainer.planning.frame_rate import Rate, choose_frames, frame_rate, frames_needed

STAGE = "references"
CHECK_SIDE = 16
"""Pixels that frames are scaled to when they are only looked for."""
FOREVER = 1 << 62
"""Timestamp after every frame: headers may say less than there is."""


@dataclass(frozen=True)
class Reference:
    """A picture, a video, or a stretch of one.

    Attributes:
        uri: path or URL.
        span: [start_pts, end_pts) in the stream's time base; None: the whole file, its best stream.
        stream: that the span is of.
        crop: x, y, width, height in display pixels; None: the whole picture.
        vfr: whether the video's frames come unevenly, as the catalog has it; None: by the frames of the stretch.
    """

    uri: str
    span: tuple[int, int] | None = None
    stream: int = 0
    crop: tuple[int, int, int, int] | None = None
    vfr: bool | None = None


def content_hash(reference: Reference) -> str:
    """Hash of what a reference shows, wherever its file lies: 32 hex digits. Reads at most 2.4 MB.

    Raises:
        MediaError: the file cannot be read, or is empty.
    """
    video, problem = identify(look_at(reference.uri))
    if problem is not None:
        raise problem
    where = None if reference.span is None else [reference.stream, *reference.span]
    told = json.dumps([video, where, reference.crop])
    return hash_hex(told, 16, "datakit-refer")


def frames_of(reference: Reference, count: int, height: int, width: int, fps: float, end: bool = False) -> np.ndarray:
    """Frames of a reference, cut to a shape in the middle and scaled once: what training reads of the clip with
    `augment: none`.

    Args:
        count: 1 for a picture.
        fps: wanted; which frames that means, and at which rate they really are, is `trainer.planning.frame_rate`' rule
            (see `check`).
        end: the last frames, not the first.

    Returns:
        uint8 [count, height, width, 3], full-range RGB.

    Raises:
        MediaError: `truncated` where there are not so many frames; `unreadable`, `not_media`, `decode` … as the file
            is.
    """
    out = np.empty((3, count, height, width), np.uint8)
    _read(reference, fps, end, out)
    return np.ascontiguousarray(out.transpose(1, 2, 3, 0))


def check(reference: Reference, count: int, fps: float, end: bool = False) -> float:
    """Read what `frames_of` would, and keep nothing.

    Returns:
        frames per second of the frames, 0 for a single one. Unlike `fps` where the source cannot give that evenly.

    Raises:
        MediaError: see `frames_of`.
    """
    return _read(reference, fps, end, np.empty((3, count, CHECK_SIDE, CHECK_SIDE), np.uint8))


def _read(reference: Reference, fps: float, end: bool, out: np.ndarray) -> float:
    """Fill `out`, uint8 [3, count, height, width]; the rate, see `check`."""
    count, height, width = out.shape[1:]
    with VideoReader(reference.uri, _stream(reference)) as reader:
        first = next(reader.frames())
        info = describe(reader, first, None)
        inside = Box(*(reference.crop or (0, 0, info.width, info.height)))
        scaler = Scaler(crop_box(inside, height / width), height, width)
        if info.kind == "image":
            if count > 1:
                raise MediaError(ErrorKind.TRUNCATED, f"{reference.uri} is a picture, {count} frames are needed", STAGE)
            scaler.rgb(first, out[:, 0])
            return 0.0
    near_s = _near_s(info, count, fps) if reference.span is None else None
    if near_s is not None:
        try:
            return _read_stretch(reference, info, fps, end, near_s, scaler, out)
        except MediaError as e:
            if e.kind not in (ErrorKind.TRUNCATED, ErrorKind.DECODE):
                raise
    return _read_stretch(reference, info, fps, end, None, scaler, out)


def _near_s(info: VideoInfo, count: int, fps: float) -> float | None:
    """Seconds at either end of a file that should hold the frames, as `trainer.data.sample_reader` reckons them; None:
    unknown."""
    if not info.fps or not info.expected_s:
        return None
    rate = frame_rate(info.fps, fps).fps if count > 1 else info.fps
    return count / rate * 1.25 + SLACK_S


def _read_stretch(
    reference: Reference,
    info: VideoInfo,
    fps: float,
    end: bool,
    near_s: float | None,
    scaler: Scaler,
    out: np.ndarray,
) -> float:
    """See `_read`.

    Args:
        near_s: look at no more than so many seconds of the file.
    """
    count = out.shape[1]
    chosen_fps = 0.0
    with ChosenFrames(reference.uri, _stream(reference)) as reader:
        base = reader.time_base
        span = None if reference.span is None else Span(*reference.span, base)
        within, until = (span, None) if near_s is None else _stretch(reader, info, near_s, end)

        def choose(pts: Sequence[int]) -> list[int]:
            nonlocal chosen_fps
            if count == 1:
                return [len(pts) - 1 if end else 0]
            rate = _rate(reference, pts, span, base, count, fps)
            chosen_fps = rate.fps
            return _chosen(pts if rate.stride else [p * base for p in pts], count, rate, end)

        for place, picture in reader.chosen(within, choose, until):
            scaler.rgb(picture, out[:, place])
    return chosen_fps


def _stretch(reader: ChosenFrames, info: VideoInfo, seconds: float, end: bool) -> tuple[Span | None, int | None]:
    """The first or the last seconds of a file: span, and timestamp that frames lie before."""
    first = reader.stream.start_time or 0
    ticks = ceil(seconds / reader.time_base)
    if not end:
        return None, first + ticks
    if info.expected_s is None:  # no header says where the end is: all of it
        return None, None
    last = first + ceil(info.expected_s / reader.time_base)
    return Span(max(first, last - ticks), FOREVER, reader.time_base), None


def _rate(reference: Reference, pts: Sequence[int], span: Span | None, base: Fraction, count: int, fps: float) -> Rate:
    """How frames are taken from those at `pts`.

    Raises:
        MediaError: they are too few.
    """
    rhythm = Rhythm()
    for p in pts:
        rhythm.add(p)
    native = len(pts) / span.seconds if span is not None else rhythm.rate(base)
    short = f"{reference.uri} has {len(pts)} frames" + (" there" if span is not None else "")
    if native is None or len(pts) < count:
        raise MediaError(ErrorKind.TRUNCATED, f"{short}, {count} are needed", STAGE)
    rate = frame_rate(native, fps, rhythm.varies() if reference.vfr is None else reference.vfr)
    needed = int(frames_needed(count, np.array([rate.stride]), np.array([rate.fps]), np.array([native]))[0])
    if needed > len(pts):
        raise MediaError(
            ErrorKind.TRUNCATED,
            f"{short} at {native:.4g} frames/s, {count} at {rate.fps:.4g} frames/s take {needed}",
            STAGE,
        )
    return rate


def _chosen(times: Sequence[int | Fraction], count: int, rate: Rate, end: bool) -> list[int]:
    """Indices of the frames. The last frames are the first of the video run backwards, so that its very last is one of
    them."""
    if not end:
        return choose_frames(times, 0, count, rate.stride, rate.fps)
    backwards = [times[-1] - time for time in reversed(times)]
    chosen = choose_frames(backwards, 0, count, rate.stride, rate.fps)
    return [len(times) - 1 - index for index in reversed(chosen)]


def _stream(reference: Reference) -> int | None:
    return None if reference.span is None else reference.stream
