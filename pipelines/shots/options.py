"""Settings of the shot detectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DetectorName = Literal["adaptive", "content", "threshold", "transnet"]


@dataclass(frozen=True, slots=True)
class DetectorOptions:
    """Settings of PySceneDetect's detectors, with the defaults of its command line.

    `threshold` None means the detector's own default; cuts nearer than `min_scene_s` are merged;
    `final_scene` makes `threshold` report a fade out that ends the video (its command line always does).
    """

    name: DetectorName = "adaptive"
    threshold: float | None = None
    window: int = 2
    min_content: float = 15.0
    min_scene_s: float = 0.6
    final_scene: bool = False
