"""The prompt that a model is trained on and sampled with: a caption, the frame rate, and the motion score. One place
for both.

Open-Sora 2.0 trains with " 24 FPS, 4 motion score." and samples with " 24 FPS. 4 motion score."; here it is the first.
"""

from __future__ import annotations

import math

MOST_MOTION = 20
"""VMAF's motion feature rarely gets above; beyond it, more is not told apart."""


def prompt(caption: str, fps: float = 0.0, motion: int | None = None) -> str:
    """A caption with what else the model is told.

    Args:
        fps: of the frames that the model sees; as a whole number. 0: an image, of which nothing is added.
        motion: score, see `motion_score`; None: not told.
    """
    caption = caption.strip()
    if not fps:
        return caption
    rate = f"{round(fps)} FPS"
    return f"{caption} {rate}." if motion is None else f"{caption} {rate}, {motion} motion score."


def motion_score(motion_vmaf: float | None) -> int | None:
    """The motion score of a clip: its `motion_vmaf` rounded to a whole number, at most 20 (the released model's default
    is 4)."""
    return None if motion_vmaf is None else min(max(math.floor(motion_vmaf + 0.5), 0), MOST_MOTION)
