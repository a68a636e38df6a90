"""How much a clip moves, and how its camera does.

All three are measured over pairs: a grid frame and the first frame at least 40 ms later, divided by their
real time difference, so that one threshold fits every resolution and frame rate. Pairs never cross a cut.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Literal

import numpy as np

from datakit.columns import Column
from pipelines.stages.base import PairStage, StageSettings

if TYPE_CHECKING:
    from datakit.video.frame import Picture

FLOW_SIDE = 256
"""Longer side, in pixels, of the luma pictures that flow is computed on."""

# libvmaf, feature/integer_motion.h: the 5-tap low-pass filter (sums to 65536).
_VMAF_KERNEL = np.array([3571, 16004, 26386, 16004, 3571], np.float32) / 65536
_VMAF_INTERVAL_S = 1 / 24


@dataclass(frozen=True, slots=True)
class FlowSample:
    """Optical flow of one pair, thinned out.

    Attributes:
        length: mean flow length over the picture, pixels.
        vectors: float32 [n], every eighth pixel's right then down components, pixels.
        size: height and width of the picture.
        seconds: time between the two frames.
    """

    length: float
    vectors: np.ndarray
    size: tuple[int, int]
    seconds: float

    @property
    def percent_per_second(self) -> float:
        """Factor from pixels to percent of the frame diagonal per second."""
        return 100.0 / math.hypot(*self.size) / self.seconds


@dataclass(frozen=True, slots=True)
class CameraMove:
    """The global part of one pair's flow.

    Attributes:
        length: mean flow length, percent of the diagonal per second.
        right, down: translation of the *content*, same unit (the camera moves the other way).
        zoom: expansion from the centre, percent per second (positive: the camera moves in).
        roll: rotation of the content about the centre, radians per second, clockwise.
        explained: share of the flow's energy that translation, zoom and roll account for, 0..1.
    """

    length: float
    right: float
    down: float
    zoom: float
    roll: float
    explained: float


class Motion(PairStage):
    """DIS optical flow (`motion.method=farneback` for the other); percent of the frame's diagonal per second; static,
    pan, tilt, zoom, roll or complex.

    DIS (Kroeger et al. 2016, arXiv:1603.03590; OpenCV's ULTRAFAST preset: within 1 % of MEDIUM
    on translations of a pixel and more, at a tenth of its cost) or Farneback (2003, OpenCV's
    example settings).
    """

    name = "motion"
    version = "1"
    order = 30
    columns = (
        Column("motion", "float32", "% of diagonal / s", "mean optical-flow length over pairs at least 40 ms apart"),
        Column("camera_motion", "string", "", "static, pan left/right, tilt up/down, zoom in/out, roll, complex"),
    )

    class Settings(StageSettings):
        method: Literal["dis", "farneback"] = "dis"
        """optical flow: OpenCV's DIS, or Farnebäck's"""

    def __init__(self, method: Literal["dis", "farneback"] = "dis"):
        self._flow = _farneback if method == "farneback" else _Dis()

    def pair(self, first: Picture, second: Picture, seconds: float) -> FlowSample:
        """Flow between two pictures `seconds` apart, at `FLOW_SIDE` pixels."""
        import cv2

        flow = self._flow(_flow_view(first), _flow_view(second))
        length = cv2.mean(cv2.magnitude(*cv2.split(flow)))[0]
        vectors = flow[4::8, 4::8].transpose(2, 0, 1).ravel()
        return FlowSample(length, vectors, flow.shape[:2], seconds)

    def summarise(self, pairs: Sequence[FlowSample]) -> dict[str, object]:
        if not pairs:
            return self.nothing()
        lengths = [p.length * p.percent_per_second for p in pairs]
        return {"motion": float(np.mean(lengths)), "camera_motion": camera_label(camera_moves(pairs))}


class MotionVmaf(PairStage):
    """VMAF's motion feature, at 360 lines, per 1/24 s.

    Mean absolute luma difference of two low-passed frames (libvmaf's `motion`, FFmpeg's `vmafmotion`), on
    8-bit codes of the 16..235 scale.
    """

    name = "motion_vmaf"
    version = "1"
    order = 40
    columns = (Column("motion_vmaf", "float32", "luma codes / (1/24 s)", "VMAF motion feature at 360 lines"),)

    def pair(self, first: Picture, second: Picture, seconds: float) -> float:
        import cv2

        a, b = first.luma(), second.luma()
        if a.shape != b.shape:
            return math.nan
        difference = cv2.subtract(a, b, dtype=cv2.CV_16S)  # the filter is linear: once instead of twice
        smooth = cv2.sepFilter2D(difference, cv2.CV_32F, _VMAF_KERNEL, _VMAF_KERNEL, borderType=cv2.BORDER_REFLECT_101)
        return cv2.norm(smooth, cv2.NORM_L1) / smooth.size * (_VMAF_INTERVAL_S / seconds)

    def summarise(self, pairs: Sequence[float]) -> dict[str, object]:
        valid = [p for p in pairs if not math.isnan(p)]
        return {"motion_vmaf": float(np.mean(valid)) if valid else None}


def camera_moves(pairs: Sequence[FlowSample]) -> list[CameraMove]:
    """Fit each pair's flow by u = dx + zoom·x − roll·y, v = dy + zoom·y + roll·x about the centre.

    Robust least squares: moving objects are down-weighted in three rounds (Cauchy weights).
    """
    moves = []
    for size, group in groupby(pairs, key=lambda p: p.size):
        group = list(group)
        solutions, explained = _fit_similarity(
            np.stack([p.vectors for p in group]).astype(np.float64), _similarity_design(*size)
        )
        for p, (dx, dy, zoom, roll), share in zip(group, solutions.tolist(), explained.tolist()):
            scale = p.percent_per_second
            moves.append(
                CameraMove(p.length * scale, dx * scale, dy * scale, zoom * 100 / p.seconds, roll / p.seconds, share)
            )
    return moves


# A pair shows a camera move when the move shifts the picture's edge by more than this, in percent of the
# diagonal per second; ours, set on generated pans, zooms and rolls and on the clips of the test footage.
_STILL = 1.0
_DOMINANT = 2.0  # one kind of move must be this many times stronger than any other
_AGREEMENT = 0.6  # of the pairs must show the clip's move


def camera_label(moves: Sequence[CameraMove]) -> str:
    """One of static, pan left/right, tilt up/down, zoom in/out, roll, complex.

    The label names the camera's movement: content drifting to the left is a pan to the right.
    """
    labels = [_pair_label(move) for move in moves]
    best = max(set(labels), key=lambda label: (labels.count(label), label))
    if labels.count(best) >= _AGREEMENT * len(labels):
        return best
    return "complex"


def _pair_label(move: CameraMove) -> str:
    # Each move as the shift it causes at the picture's edge, half a diagonal (50 %) from the centre.
    shifts = {"pan": abs(move.right), "tilt": abs(move.down), "zoom": abs(move.zoom) / 2, "roll": abs(move.roll) * 50}
    kind, size = max(shifts.items(), key=lambda item: item[1])
    if move.explained < 0.5:  # something moves, but not the picture as a whole
        return "static" if size < 2 * _STILL else "complex"
    if size < _STILL:
        return "static"
    if any(shift * _DOMINANT > size for name, shift in shifts.items() if name != kind):
        return "complex"
    if kind == "pan":
        return "pan right" if move.right < 0 else "pan left"
    if kind == "tilt":
        return "tilt down" if move.down < 0 else "tilt up"
    if kind == "zoom":
        return "zoom in" if move.zoom > 0 else "zoom out"
    return "roll"


class _Dis:
    def __init__(self) -> None:
        import cv2

        self._dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)

    def __call__(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        if min(first.shape) < 16 or first.shape != second.shape:  # below DIS's smallest pyramid level
            return _farneback(first, second)
        return self._dis.calc(first, second, None)


def _flow_view(picture: Picture) -> np.ndarray:
    import cv2

    from datakit.video.frame import fit

    luma = picture.luma()
    return cv2.resize(luma, fit(luma.shape[1], luma.shape[0], FLOW_SIDE))


def _farneback(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    import cv2

    if first.shape != second.shape:
        second = cv2.resize(second, first.shape[::-1])
    return cv2.calcOpticalFlowFarneback(first, second, None, 0.5, 3, 15, 3, 5, 1.2, 0)


def _fit_similarity(targets: np.ndarray, design: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fit all pairs of a clip at once.

    Args:
        targets: float64 [pairs, n].
        design: float64 [n, 4], see `_similarity_design`.

    Returns:
        [pairs, 4] of dx, dy in pixels, zoom (factor − 1), roll in radians; [pairs] of the share explained.
    """
    half = targets.shape[1] // 2
    weights = np.ones_like(targets)
    for _ in range(3):
        weighted = weights[:, :, None] * design
        moments = (weighted * targets[:, :, None]).sum(axis=1)
        solutions = np.linalg.solve(weighted.transpose(0, 2, 1) @ design, moments[:, :, None])[:, :, 0]
        residuals = targets - solutions @ design.T
        squares = residuals[:, :half] ** 2 + residuals[:, half:] ** 2
        spread = np.median(squares, axis=1, keepdims=True) * 4 + 1e-6  # of twice the median length
        weights = np.tile(1 / (1 + squares / spread), 2)
    energy = (targets**2).sum(axis=1)
    explained = 1 - (residuals**2).sum(axis=1) / np.where(energy > 0, energy, 1)
    return solutions, np.where(energy > 0, explained, 0.0).clip(0.0, 1.0)


@lru_cache(maxsize=16)
def _similarity_design(height: int, width: int) -> np.ndarray:
    ys, xs = np.mgrid[4:height:8, 4:width:8].astype(np.float64)
    x, y = xs.ravel() - (width - 1) / 2, ys.ravel() - (height - 1) / 2
    one, zero = np.ones_like(x), np.zeros_like(x)
    return np.concatenate([np.stack([one, zero, x, -y], 1), np.stack([zero, one, y, x], 1)])
