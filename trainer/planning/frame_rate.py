"""Frame rates: which frames of a clip make a window at the target rate, and which rate that really is.

The rules, for a source of `f` frames/s and a target of `t`:

1. `f` within 2 % of a whole multiple `k·t`: every k-th frame, one to one. The rate is `f / k` (23.976 stays 23.976).
2. Else frames are chosen by timestamp, the nearest to every `n / t`, if that is even enough: no chosen frame may lie
   further than `time_error` of a frame interval from its time. The nearest frame may be half a source interval away, so
   this takes a source of at least `t / (2 · time_error)` frames/s: 120 at the default.
3. Else every k-th frame, k such that the interval comes nearest to the target's (the smaller k where two are as near):
   the rate is `f / k`, and the prompt says so. 25 stays 25, 30 stays 30, 50 becomes 25, 60 becomes 30. Slower sources
   keep their rate.

Why a limit of a tenth of an interval (4.2 ms at 24 frames/s): it is what the catalog calls an even rate (`vfr`:
intervals that differ by more than a tenth of their mean). 30 to 24 by timestamp drops every fifth frame: four steps of
33 ms, then one of 67 ms. 60 to 24 alternates between 33 and 50 ms. A model learns that stutter; told the true rate, it
learns the motion.

A source of variable rate has no even rate to keep. Its frames are always chosen by timestamp: at the target; or, when
it has too few, at its own mean rate if that is within 2 % of the target, else at the largest `t / k` that it reaches;
each within one interval of its time (a phone that drops a frame needs that much). What is further off is told when it
is read (`choose_frames`).

A frame is never shown twice.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from datakit.errors import ErrorKind, MediaError

SAME_RATE = 0.02
"""Rates closer than this are the same: 23.976 and 24, 29.97 and 30."""
TIME_ERROR = 0.1
"""Of a target frame interval: how far a frame chosen by timestamp may lie from its time. See the module for why."""
READ_ERROR = 1
"""In intervals: further off than that, a frame of a source of variable rate shows what belongs to its neighbour."""


@dataclass(frozen=True)
class Rate:
    """How frames are taken: every `stride`-th, or by timestamps (0); and the frames per second that this gives."""

    stride: int
    fps: float


def frame_rate(native_fps: float, target_fps: float, vfr: bool = False, time_error: float = TIME_ERROR) -> Rate:
    """The rule for one clip. See the module.

    Args:
        native_fps: the clip's frames over its duration.
        vfr: its frames do not come evenly.
        time_error: of a target frame interval.
    """
    strides, fps = frame_rates(np.array([native_fps]), np.array([vfr]), target_fps, time_error)
    return Rate(int(strides[0]), float(fps[0]))


def frame_rates(
    native_fps: np.ndarray,
    vfr: np.ndarray,
    target_fps: float,
    time_error: float = TIME_ERROR,
) -> tuple[np.ndarray, np.ndarray]:
    """`frame_rate` for many clips.

    Args:
        native_fps: float64 [clips], above 0.
        vfr: bool [clips].

    Returns:
        strides, int64 [clips]; frames per second to three decimals, float64 [clips].
    """
    ratio = native_fps / target_fps
    nearest = np.maximum(np.rint(ratio), 1)
    one_to_one = np.abs(ratio / nearest - 1) <= SAME_RATE
    even_enough = (ratio > 1) & (0.5 / ratio <= time_error * (1 + 1e-9))
    # Of k and k + 1 source intervals the nearer to the target's; half way (60 to 24), also by a rate that is not quite
    # exact: k.
    native = np.maximum(np.ceil(ratio / (1 + SAME_RATE) - 0.5), 1)
    strides = np.where(one_to_one, nearest, np.where(even_enough, 0, native))
    fps = np.where(strides > 0, native_fps / np.maximum(strides, 1), target_fps)
    own = vfr & one_to_one & (nearest == 1)
    fraction = np.maximum(np.ceil(1 / ratio - 1e-9), 1)
    fps = np.where(own, native_fps, np.where(vfr, target_fps / fraction, fps))
    return np.where(vfr, 0, strides).astype(np.int64), np.round(fps, 3)


def frames_needed(frames: int, strides: np.ndarray, fps: np.ndarray, native_fps: np.ndarray) -> np.ndarray:
    """Source frames from the first to the last chosen one, both counted. int64 [clips].

    By timestamps it is what an even source of the clip's mean rate takes, and never less than one for each.
    """
    steps = np.ceil((frames - 1) * native_fps / np.where(fps > 0, fps, 1.0) - 0.5 - 1e-6)
    by_time = np.maximum(steps.astype(np.int64) + 1, frames)
    return np.where(strides > 0, (frames - 1) * strides + 1, by_time)


def choose_frames(times: Sequence[Fraction | float], first: int, frames: int, stride: int, fps: float) -> list[int]:
    """Which frames of a clip are those of a window.

    Args:
        times: of the clip's frames from its first on, rising, in seconds (PTS · time base, exact as Fractions). Where
            the window goes by stride only their number counts; else they must reach to the end of the clip, or an
            interval past the window's end.
        first: index into `times` of the window's first frame.
        frames: of the window.
        stride, fps: see `Rate`.

    Returns:
        so many rising indices into `times`, no frame twice.

    Raises:
        MediaError: the clip has fewer frames than the catalog says, or (by timestamps) there is no frame left
            within an interval of where one is needed.
    """
    last = first + (frames - 1) * max(stride, 1)
    if last >= len(times):
        raise MediaError(
            ErrorKind.TRUNCATED, f"the clip has {len(times)} frames, the window needs frame {last}", "frames"
        )
    if stride > 0 or frames == 1:
        return list(range(first, last + 1, max(stride, 1)))
    interval = 1 / Fraction(fps).limit_denominator(1000)
    start = times[first]
    chosen: list[int] = []
    for n in range(frames):
        ideal = start + n * interval
        lowest = chosen[-1] + 1 if chosen else first
        index = min(max(_nearest(times, ideal), lowest), len(times) - (frames - n))
        if abs(times[index] - ideal) > READ_ERROR * interval:
            raise MediaError(
                ErrorKind.DECODE,
                (
                    f"frames come too unevenly for {fps:g} frames/s: the nearest left at {float(ideal):.3f} s "
                    f"is "
                    f"{float(abs(times[index] - ideal)) * 1000:.0f} ms away"
                ),
                "frames",
            )
        chosen.append(index)
    return chosen


def _nearest(times: Sequence[Fraction | float], moment: Fraction | float) -> int:
    """Index of the nearest time; of two, the earlier."""
    after = bisect_left(times, moment)
    if after == 0:
        return 0
    if after == len(times) or moment - times[after - 1] <= times[after] - moment:
        return after - 1
    return after
