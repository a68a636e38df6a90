"""Decoded pictures without a file."""

from __future__ import annotations

import av
import numpy as np

from datakit.video.frame import Geometry, Picture


def picture(pixels: np.ndarray) -> Picture:
    """Of luma codes, uint8 [h, w], or of RGB, uint8 [h, w, 3]."""
    frame = av.VideoFrame.from_ndarray(pixels, format="gray" if pixels.ndim == 2 else "rgb24")
    return Picture(frame, Geometry.of(frame), pts=0, duration=1, index=0)
