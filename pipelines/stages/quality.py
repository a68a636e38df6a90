"""Technical picture quality: sharpness, brightness, contrast, colourfulness, interlacing.

Measured on grid frames at a fixed working size, so that thresholds mean the same at every resolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from datakit.columns import Column
from pipelines.stages.base import FrameStage

if TYPE_CHECKING:
    from datakit.video.frame import Picture

BLUR_FRAMES = 5
"""Open-Sora 2.0 (arXiv:2503.09642, §2): sharpness over five frames; the median is their majority vote."""
COMBED = 1.2
"""A progressive picture's adjacent lines differ less than lines two apart (ratio 0.5 to 0.9 on natural
footage); above this ratio moving edges alternate between fields."""


@dataclass(frozen=True, slots=True)
class FrameQuality:
    """`blur` variance of the Laplacian; the others 0..1; `combed` whether field lines alternate."""

    blur: float
    brightness: float
    contrast: float
    saturation: float
    combed: bool


class Quality(FrameStage):
    """Sharpness, light, colour and combing, at fixed working sizes."""

    name = "quality"
    version = "1"
    order = 60
    columns = (
        Column(
            "blur",
            "float32",
            "codes²",
            "variance of the Laplacian at 360 lines, median over 5 frames (low: blurred)",
            good=1,
        ),
        Column("brightness", "float32", "0..1", "mean luma"),
        Column("contrast", "float32", "0..1", "standard deviation of luma"),
        Column("saturation", "float32", "0..1", "mean HSV saturation"),
        Column("interlaced", "float32", "0..1", "share of frames whose lines alternate between fields", good=-1),
    )

    def frame(self, picture: Picture) -> FrameQuality:
        import cv2

        luma = picture.luma()
        laplacian = cv2.Laplacian(luma, cv2.CV_16S)
        bgr, _ = picture.detector_view()
        mean, spread = cv2.meanStdDev(luma)
        saturation = cv2.cvtColor(bgr, cv2.COLOR_BGR2HSV)[..., 1]
        return FrameQuality(
            blur=cv2.norm(laplacian, cv2.NORM_L2SQR) / laplacian.size - cv2.mean(laplacian)[0] ** 2,
            brightness=min(1.0, max(0.0, (float(mean[0, 0]) - 16) / 219)),
            contrast=float(spread[0, 0]) / 219,
            saturation=float(saturation.mean()) / 255,
            combed=is_combed(picture.full_luma()),
        )

    def summarise(self, frames: Sequence[FrameQuality]) -> dict[str, object]:
        if not frames:
            return self.nothing()
        spread = np.linspace(0, len(frames) - 1, min(BLUR_FRAMES, len(frames))).round().astype(int)
        return {
            "blur": float(np.median([frames[i].blur for i in spread])),
            "brightness": float(np.mean([f.brightness for f in frames])),
            "contrast": float(np.mean([f.contrast for f in frames])),
            "saturation": float(np.mean([f.saturation for f in frames])),
            "interlaced": float(np.mean([f.combed for f in frames])),
        }


def is_combed(luma: np.ndarray) -> bool:
    """Whether lines alternate between two moments in time, as in undeinterlaced footage.

    Args:
        luma: full-size luma plane [h, w]; the middle quarter of its columns is looked at.
    """
    import cv2

    height, width = luma.shape
    if height < 64:
        return False
    band = luma[: height // 2 * 2, width * 3 // 8 : width * 5 // 8]
    adjacent = cv2.norm(band[:-2], band[1:-1], cv2.NORM_L1)
    same_field = cv2.norm(band[:-2], band[2:], cv2.NORM_L1)
    return adjacent > COMBED * same_field and adjacent / band.size > 0.5
