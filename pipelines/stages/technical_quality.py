"""How natural a clip's pixels are: BRISQUE, weights in the package `brisque` (Apache-2.0; only its two data files are
read).

A. Mittal, A. K. Moorthy, A. C. Bovik, "No-Reference Image Quality Assessment in the Spatial Domain", IEEE TIP 21(12),
2012. Blur, noise, blocks and other damage change the statistics of locally normalised luma; a support vector
    regression, trained on
opinions of people about the LIVE images, turns 36 of these statistics into a score. What to know when setting a
threshold: it learned from photographs of about 768x512, drawings score by other standards; damage finer than a pixel of
    the 640 that image
stages see is not seen; faint grain (up to some 8 codes) on a soft picture passes for detail and raises the score.

The 36 numbers are the package's, which differ a little from the authors' MATLAB: zeros beyond the borders, half size
with aliasing, BT.709 luma.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datakit.columns import Column
from datakit.dependencies import install_command
from pipelines.stages.base import ImageSettings, ImageStage
from pipelines.stages.ocr import crop

WINDOW = 7
SIGMA = 7 / 6
"""Gaussian window of local mean and deviation, pixels (paper, section III-A)."""
LEAST_SIDE = 2 * WINDOW
"""Pixels; of less, the window at half size would be larger than the picture."""
FLAT = 2 / 255
"""A luma range no wider than this, of 1, is what rounding makes of one colour: no contrast at all."""
ROUNDING = 2.0**16
"""Added and taken away again, in float64, this leaves multiples of 2⁻³⁶. In flat areas the difference from the local
mean is rounding noise of 1e-17, and the statistics count signs: without this, a slide's score would hang on how the
filter rounds."""
LUMA = np.array([[0.2125, 0.7154, 0.0721]]) / 255
"""uint8 RGB to 0..1 as `skimage.color.rgb2gray` weighs it, which the package uses."""


class TechnicalQuality(ImageStage):
    """BRISQUE as 0..1, high is good.

    1 − clip(BRISQUE, 0, 100) / 100, mean over the clip's frames: BRISQUE itself is high for bad pictures. A frame
    without contrast (black, or one colour) or of fewer than `LEAST_SIDE` lines or columns has no statistics and does
    not count; a clip of none but such frames has no score.
    """

    name = "technical_quality"
    version = "1"
    order = 100
    columns = (
        Column(
            "quality", "float32", "0..1", "technical quality: 1 − BRISQUE/100, mean over frames (high: good)", good=1
        ),
    )
    upstream = ("letterbox",)
    requires = (("brisque", "quality"),)

    class Settings(ImageSettings):
        enabled: bool = False
        """whether this stage runs"""

    def __init__(self) -> None:
        self._regression = Regression.shipped()
        shape_tables()  # now, not in the first clip's time

    def run(self, rows: Sequence[dict], images: Sequence[Sequence[np.ndarray]]) -> list[dict[str, object]]:
        """Columns of each clip.

        Args:
            rows: the clips; their crop boxes are used.
            images: for each clip its uint8 RGB pictures [h, w, 3].
        """
        features = [[brisque_features(luma(crop(image, row))) for image in clip] for row, clip in zip(rows, images)]
        return [{"quality": self._quality([f for f in clip if f is not None])} for clip in features]

    def _quality(self, features: list[np.ndarray]) -> float | None:
        if not features:
            return None
        return float(np.mean(1 - np.clip(self._regression.predict(np.stack(features)), 0, 100) / 100))


@dataclass(frozen=True)
class Regression:
    """Epsilon-SVR with a radial kernel: Σ weightᵢ · exp(−gamma · |x − vectorᵢ|²) − rho, of features scaled to −1..1.

    Attributes:
        vectors: support vectors [v, 36].
        weights: their coefficients [v].
        low, high: range of each feature in training [36]; features outside it scale beyond −1..1.
    """

    vectors: np.ndarray
    weights: np.ndarray
    gamma: float
    rho: float
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def shipped(cls) -> Regression:
        """The weights in the package `brisque`, whose code is not imported: it needs scikit-image, scipy and libsvm,
        and fails on numpy 2.4.

        Raises:
            ModuleNotFoundError: the package is not installed.
        """
        spec = importlib.util.find_spec("brisque")
        if spec is None:
            raise ModuleNotFoundError(f"technical_quality needs brisque: {install_command('quality')}")
        models = Path(spec.submodule_search_locations[0]) / "models"
        ranges = Plain((models / "normalize.pickle").open("rb")).load()
        low, high = (np.array(ranges[key]) for key in ("min_", "max_"))
        return cls(**parse_libsvm((models / "svm.txt").read_text(), len(low)), low=low, high=high)

    def predict(self, features: np.ndarray) -> np.ndarray:
        """BRISQUE of features [n, 36]: about 0 (pristine) to 100, not clipped. [n]"""
        x = 2 * (features - self.low) / (self.high - self.low) - 1
        distances = ((x[:, None] - self.vectors) ** 2).sum(-1)
        return np.exp(-self.gamma * distances) @ self.weights - self.rho


class Plain(pickle.Unpickler):
    """Reads numbers, lists and dicts, and nothing that could run code."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"plain data only, not {module}.{name}")


def parse_libsvm(text: str, width: int) -> dict[str, object]:
    """Support vectors, weights, gamma and rho of a libsvm model file: `key value` lines, `SV`, then lines of
    `weight index:value …` with indices from 1; values that are not named are 0."""
    head, _, body = text.partition("\nSV\n")
    facts = dict(line.split(" ", 1) for line in head.splitlines())
    if (facts["svm_type"], facts["kernel_type"]) != ("epsilon_svr", "rbf"):
        raise ValueError(
            f"an epsilon_svr with rbf kernel is needed, not {facts['svm_type']} with {facts['kernel_type']}"
        )
    rows = [line.split() for line in body.splitlines()]
    vectors = np.zeros((len(rows), width))
    for vector, row in zip(vectors, rows):
        for entry in row[1:]:
            index, value = entry.split(":")
            vector[int(index) - 1] = float(value)
    weights = np.array([float(row[0]) for row in rows])
    return {"vectors": vectors, "weights": weights, "gamma": float(facts["gamma"]), "rho": float(facts["rho"])}


def luma(image: np.ndarray) -> np.ndarray:
    """uint8 RGB [h, w, 3] as luma, float64 0..1 [h, w]."""
    import cv2

    return cv2.transform(image.astype(np.float64), LUMA)


def brisque_features(grey: np.ndarray) -> np.ndarray | None:
    """The 36 features of a luma picture (float64, 0..1) as the package orders them: 18 at full size, 18 at half.

    Returns:
        None when the picture is too small or without contrast.
    """
    import cv2

    if min(grey.shape) < LEAST_SIDE or np.ptp(grey) <= FLAT:
        return None
    half = cv2.resize(grey, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_CUBIC)  # aliases, as the package's does
    features = np.concatenate([scale_features(normalised(picture)) for picture in (grey, half)])
    return features if np.isfinite(features).all() else None


def normalised(grey: np.ndarray) -> np.ndarray:
    """Mean-subtracted, contrast-normalised luma, (I − μ) / (σ + 1/255), with zeros beyond the borders. float32 [h, w]

    The moments are taken in float64: σ is a small difference of large numbers.
    """
    mean, variance = _blurred(grey), _blurred(grey * grey)
    variance -= mean * mean
    deviation = np.sqrt(np.abs(variance, out=variance), out=variance)
    deviation += 1 / 255
    detail = grey - mean
    detail += ROUNDING
    detail -= ROUNDING
    return np.divide(detail, deviation, out=detail).astype(np.float32)


def _blurred(picture: np.ndarray) -> np.ndarray:
    import cv2

    return cv2.GaussianBlur(picture, (WINDOW, WINDOW), SIGMA, borderType=cv2.BORDER_CONSTANT)


def scale_features(m: np.ndarray) -> np.ndarray:
    """18 features of one scale: shape and variance of the coefficients, then shape, mean, left and right variance of
    the products of neighbours: horizontal, vertical, main and secondary diagonal."""
    shape, _, left, right = asymmetric_fit(m)
    pairs = ((m[:, :-1], m[:, 1:]), (m[:-1], m[1:]), (m[:-1, :-1], m[1:, 1:]), (m[1:, :-1], m[:-1, 1:]))
    products = [asymmetric_fit(a * b) for a, b in pairs]
    return np.array([shape, (left + right) / 2, *(value for fit in products for value in fit)])


def asymmetric_fit(x: np.ndarray) -> tuple[float, float, float, float]:
    """Asymmetric generalised Gaussian by moment matching (Lasmar, Stitou, Berthoumieu, ICIP 2009).

    Args:
        x: values, float32; zeros count as right of the middle.

    Returns:
        shape, mean, left variance, right variance; NaN when all values are zero.
    """
    import cv2

    below = np.minimum(x, 0)
    total, left_total, count = cv2.norm(x, cv2.NORM_L2SQR), cv2.norm(below, cv2.NORM_L2SQR), cv2.countNonZero(below)
    if total == 0:
        return (math.nan,) * 4
    left, right = left_total / max(count, 1), max(total - left_total, 0.0) / max(x.size - count, 1)
    # The paper's (γ³ + 1)(γ + 1) / (γ² + 1)² of γ = √left / √right, without the division: a side may be empty.
    asymmetry = (left**1.5 + right**1.5) * (left**0.5 + right**0.5) / (left + right) ** 2
    shapes, ratios, means = shape_tables()
    shape = float(np.interp((cv2.norm(x, cv2.NORM_L1) / x.size) ** 2 / (total / x.size) * asymmetry, ratios, shapes))
    mean = (right**0.5 - left**0.5) * float(np.interp(shape, shapes, means))
    return shape, mean, left, right


@functools.cache
def shape_tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shapes 0.2 … 10 in the paper's steps of 0.001; for each Γ(2/a)² / (Γ(1/a) Γ(3/a)), which rises with a, and the
    factor √(Γ(1/a) / Γ(3/a)) · Γ(2/a) / Γ(1/a) of the mean."""
    shapes = np.linspace(0.2, 10, 9801)
    one, two, three = (np.array([math.lgamma(n / a) for a in shapes]) for n in (1, 2, 3))
    return shapes, np.exp(2 * two - one - three), np.exp((one - three) / 2 + two - one)
