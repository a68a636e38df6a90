"""Videos to look at."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
from torch import Tensor

from datakit.atomic import atomic_path
from datakit.video.writer import VideoWriter


def to_pixels(video: Tensor) -> np.ndarray:
    """[3, T, H, W] in −1..1 -> uint8 [T, H, W, 3]."""
    return (video.float().clamp(-1, 1) * 127.5 + 127.5).round().byte().permute(1, 2, 3, 0).cpu().numpy()


def write_video(video: Tensor, path: Path, fps: float) -> Path:
    """An mp4, whole or not at all.

    Args:
        video: [3, T, H, W] in −1..1.
        fps: 0: an image, shown for a second.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = to_pixels(video)
    step = 1 / Fraction(fps or 1).limit_denominator(1001)
    with (
        atomic_path(path) as aside,
        VideoWriter(aside, pixels.shape[2], pixels.shape[1], Fraction(step), float(1 / step)) as writer,
    ):
        for i, picture in enumerate(pixels):
            writer.write_rgb(picture, i)
    return path
