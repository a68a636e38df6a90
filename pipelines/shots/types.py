"""What shot detectors are fed with and give back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class Cut:
    """The first frame of a new shot, and the detector's score for it.

    `score` is the adaptive ratio, the content value, the mean of B, G, R (threshold), or TransNetV2's
    probability.
    """

    frame: int
    pts: int
    score: float


@dataclass(frozen=True, slots=True)
class FrameNote:
    """What the pass over a frame leaves behind for the detectors and for the division into clips.

    Attributes:
        change: PySceneDetect's content value against the frame before, 0..255 (0 on the first).
        mean: mean of B, G, R over the frame, 0..255: what ThresholdDetector compares.
        spread: standard deviation of the luma codes; only looked at where the frame is dark, else 0.
        thumbnail: uint8 RGB [27, 48, 3], where TransNetV2 is to see it.
    """

    change: float
    mean: float
    spread: float = 0.0
    thumbnail: np.ndarray | None = None


class ShotDetector(Protocol):
    settled: int
    """No cut at a frame index below this one will be reported any more."""
    transitions: set[int]
    """Indices of frames inside a gradual transition: they belong to no clip."""

    def feed(self, pts: int, note: FrameNote) -> list[Cut]:
        """Take the next frame; give the cuts that became certain."""
        ...

    def finish(self) -> list[Cut]:
        """The cuts that only the end of the video settles."""
        ...
