"""Shot detection: PySceneDetect's own detectors, and TransNetV2, fed from our decode pass.

The detectors see what they would see under PySceneDetect's command line (frames scaled to 256 pixels,
OpenCV's colour conversion, timecodes from real timestamps), so that the cut lists are the same; only
their inner loop over pixels is replaced by OpenCV calls that give the same whole numbers.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from fractions import Fraction
from typing import Any

import cv2
import numpy as np
from scenedetect.common import FrameTimecode, Timecode
from scenedetect.detectors import AdaptiveDetector, ContentDetector, ThresholdDetector

from datakit.video.frame import Picture
from pipelines.shots.options import DetectorOptions
from pipelines.shots.types import Cut, FrameNote, ShotDetector

THUMBNAIL = (48, 27)
"""Width and height of TransNetV2's input."""
DIM = 64.0
"""Frames darker than this on average are looked at for whether they show anything."""
LONGEST_FADE_S = 30.0
"""ThresholdDetector reports a cut in the middle of a fade once it is over; waiting for it ends here."""


def make_detector(options: DetectorOptions, fps: float, time_base: Fraction) -> ShotDetector:
    """A fresh detector for one video with average rate `fps` and timestamps in `time_base` seconds."""
    if options.name == "transnet":
        from pipelines.shots.transnet import TransNetDetector

        return TransNetDetector(threshold=0.5 if options.threshold is None else options.threshold)
    return SceneDetectAdapter(options, fps, time_base)


class ContentMeter:
    """Frame-to-frame change as `ContentDetector` computes it, and the frame's mean."""

    def __init__(self, thumbnails: bool = False) -> None:
        self._last: np.ndarray | None = None
        self._thumbnails = thumbnails

    def note(self, picture: Picture) -> FrameNote:
        bgr, y = picture.detector_view()
        hsv = cv2.cvtColor(bgr, cv2.COLOR_BGR2HSV)
        pixels = hsv.shape[0] * hsv.shape[1]
        change = 0.0
        if self._last is not None and self._last.shape == hsv.shape:
            hue, saturation, value, _ = cv2.sumElems(cv2.absdiff(hsv, self._last))
            change = (hue / pixels + saturation / pixels + value / pixels) / 3.0
        self._last = hsv
        thumbnail = cv2.resize(bgr, THUMBNAIL, interpolation=cv2.INTER_AREA)[..., ::-1] if self._thumbnails else None
        mean = sum(cv2.sumElems(bgr)) / bgr.size
        spread = float(cv2.meanStdDev(y)[1][0, 0]) if mean < DIM else 0.0
        return FrameNote(change, mean, spread, thumbnail)


class SceneDetectAdapter:
    """One of PySceneDetect's detectors behind `ShotDetector`."""

    def __init__(self, options: DetectorOptions, fps: float, time_base: Fraction):
        self.settled = 0
        self.transitions: set[int] = set()
        self._options = options
        self._rate = Fraction(fps).limit_denominator(1001)
        self._time_base = time_base
        self._frames_per_unit = float(self._rate * time_base)
        self._pts = array("q")  # of every frame: 8 bytes each, so that any cut finds its frame
        self._scores = array("f")
        # Whole frames at the average rate, as PySceneDetect's command line turns 0.6s into 14 at 24 fps.
        min_scene = FrameTimecode(options.min_scene_s, fps=self._rate).frame_num
        self._hold = (min_scene + 1) / self._rate / time_base if min_scene else 0
        self._detector = _FEEDABLE[options.name](options, min_scene)

    def feed(self, pts: int, note: FrameNote) -> list[Cut]:
        self._pts.append(pts)
        self._code = self._timecode(pts - self._pts[0])
        found = self._detector.feed(self._code, note)
        self._scores.append(self._detector.score(note))
        cuts = [self._cut(code) for code in found]
        self.settled = self._settled()
        return cuts

    def finish(self) -> list[Cut]:
        if not self._pts:
            return []
        cuts = [self._cut(code) for code in self._detector.post_process(self._code)]
        self.settled = len(self._pts)
        return cuts

    def _timecode(self, pts: int) -> FrameTimecode | _Timecode:
        if self._options.name == "threshold":  # makes timecodes of its own from those it gets
            return FrameTimecode(Timecode(pts, self._time_base), fps=self._rate)
        return _Timecode(pts, self._frames_per_unit, self._rate)

    def _cut(self, code: FrameTimecode | _Timecode) -> Cut:
        if isinstance(code, FrameTimecode):  # of threshold: a frame number at the average rate, not a frame's time
            at = self._pts[0] + round(code.frame_num / self._rate / self._time_base)
            index = bisect_left(self._pts, at - round(1 / self._rate / self._time_base / 2))
            index = max(min(index, len(self._pts) - 1), self.settled)
        else:
            index = bisect_left(self._pts, code.pts + self._pts[0])
        # The adaptive score of a frame is known `window` frames later.
        lag = self._options.window if self._options.name == "adaptive" else 0
        return Cut(index, self._pts[index], self._scores[min(index + lag, len(self._scores) - 1)])

    def _settled(self) -> int:
        seen = len(self._pts)
        if self._options.name == "adaptive":
            return max(0, seen - self._options.window)
        if self._options.name == "content":  # FlashFilter holds a cut back that long
            return bisect_right(self._pts, self._pts[-1] - self._hold) if self._hold else seen
        fade = self._detector.last_fade
        if fade["type"] != "out":
            return seen
        out = bisect_left(self._pts, fade["frame"].pts + self._pts[0])
        return max(out, bisect_left(self._pts, self._pts[-1] - round(LONGEST_FADE_S / self._time_base)))


class _Timecode:
    """What the detectors use of `FrameTimecode` on timestamps, at a twentieth of its cost per frame.

    Differences are compared in whole frames at the average rate, as `FrameTimecode` compares them.
    """

    __slots__ = ("pts", "frame_rate", "_frames_per_unit")

    def __init__(self, pts: int, frames_per_unit: float, frame_rate: Fraction):
        self.pts = pts
        self.frame_rate = frame_rate
        self._frames_per_unit = frames_per_unit

    def __sub__(self, other: _Timecode) -> _Timecode:
        return _Timecode(max(0, self.pts - other.pts), self._frames_per_unit, self.frame_rate)

    def __ge__(self, frames: int) -> bool:
        return round(self.pts * self._frames_per_unit) >= frames


class _Adaptive(AdaptiveDetector):
    def __init__(self, options: DetectorOptions, min_scene: int):
        super().__init__(
            adaptive_threshold=_either(options.threshold, 3.0),
            min_scene_len=min_scene,
            window_width=options.window,
            min_content_val=options.min_content,
        )
        self.stats_manager: Any = self  # receives the ratio that `process_frame` keeps to itself
        self._ratio = 0.0

    def feed(self, code: FrameTimecode, note: FrameNote) -> list[FrameTimecode]:
        self._note = note
        self._ratio = 0.0
        return self.process_frame(code, _NO_IMAGE)

    def score(self, note: FrameNote) -> float:
        return self._ratio

    def set_metrics(self, code: FrameTimecode, metrics: dict[str, float]) -> None:
        self._ratio = metrics[self._adaptive_ratio_key]

    def _calculate_frame_score(self, timecode: FrameTimecode, frame_img: np.ndarray) -> float:
        return self._note.change


class _Content(ContentDetector):
    def __init__(self, options: DetectorOptions, min_scene: int):
        super().__init__(threshold=_either(options.threshold, 27.0), min_scene_len=min_scene)

    def feed(self, code: FrameTimecode, note: FrameNote) -> list[FrameTimecode]:
        self._note = note
        return self.process_frame(code, _NO_IMAGE)

    def score(self, note: FrameNote) -> float:
        return note.change

    def _calculate_frame_score(self, timecode: FrameTimecode, frame_img: np.ndarray) -> float:
        return self._note.change


class _Threshold(ThresholdDetector):
    def __init__(self, options: DetectorOptions, min_scene: int):
        super().__init__(
            threshold=_either(options.threshold, 12.0), min_scene_len=min_scene, add_final_scene=options.final_scene
        )

    def feed(self, code: FrameTimecode, note: FrameNote) -> list[FrameTimecode]:
        return self.process_frame(code, np.asarray(note.mean))  # it takes the mean of what it gets

    def score(self, note: FrameNote) -> float:
        return note.mean


_NO_IMAGE = np.empty((0, 0, 3), np.uint8)
_FEEDABLE = {"adaptive": _Adaptive, "content": _Content, "threshold": _Threshold}


def _either(value: float | None, default: float) -> float:
    return default if value is None else value
