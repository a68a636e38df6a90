"""The one colour conversion: Y'CbCr codes of any tagging to full-range R'G'B'.

Tags are respected; an untagged stream of 720 lines or more is BT.709, below that BT.601, limited range
(the convention of ITU-R BT.709/BT.601 and of every player). Nothing else in datakit holds a matrix;
`swscale_tables` repeats FFmpeg's rounding for the shot detectors.

PQ and HLG streams are converted by their matrix only; recipes reject them by `color_transfer`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import av
import numpy as np

from datakit.errors import ErrorKind, MediaError

COLOUR_VERSION = 1
"""Of the conversion in this module: raise it when the same file gives other pixels. It is part of the geometry of every
window of a plan, so that latents of other pixels are stale."""
# Luma coefficients (Kr, Kb): ITU-R BT.709-6, BT.601-7, BT.2020-2; SMPTE 240M; FCC 73.682.
MATRICES = {
    "bt709": (0.2126, 0.0722),
    "bt601": (0.299, 0.114),
    "bt2020": (0.2627, 0.0593),
    "smpte240m": (0.212, 0.087),
    "fcc": (0.30, 0.11),
}
# AVColorSpace, libavutil/pixfmt.h
_AV_MATRIX = {1: "bt709", 4: "fcc", 5: "bt601", 6: "bt601", 7: "smpte240m", 9: "bt2020", 10: "bt2020"}
_AV_UNSPECIFIED = (2, 3)
_AV_RGB = 0
_AV_FULL = 2


@dataclass(frozen=True, slots=True)
class Colour:
    """How the codes of a stream mean colour. `matrix` is a key of `MATRICES` or `rgb`."""

    matrix: str
    full_range: bool
    tagged: bool = True

    @property
    def as_opencv(self) -> Colour:
        """What OpenCV's reader takes it for: BT.601 unless tagged, whatever the size."""
        return self if self.tagged else Colour("bt601", self.full_range)

    @classmethod
    def of(cls, frame: av.VideoFrame) -> Colour:
        name = frame.format.name
        if frame.format.is_rgb or name in ("pal8", "monob", "monow"):
            return cls("rgb", True)
        full = int(frame.color_range) == _AV_FULL or name.startswith("yuvj")
        space = int(frame.colorspace)
        if space in _AV_UNSPECIFIED or space == _AV_RGB:  # RGB tag on Y'CbCr codes: a broken tag
            return cls("bt709" if frame.height >= 720 else "bt601", full, tagged=False)
        if space not in _AV_MATRIX:
            raise MediaError(ErrorKind.UNSUPPORTED, f"colour matrix {frame.colorspace!r} is not supported")
        return cls(_AV_MATRIX[space], full)


@lru_cache(maxsize=64)
def yuv_to_rgb(colour: Colour) -> np.ndarray:
    """Affine map from 8-bit (Y', Cb, Cr) codes to 8-bit (R', G', B'), for `cv2.transform`.

    Returns:
        float32 [3, 4]: the last column is the offset.
    """
    kr, kb = MATRICES[colour.matrix]
    kg = 1.0 - kr - kb
    matrix = np.array(
        [[1, 0, 2 * (1 - kr)], [1, -2 * kb * (1 - kb) / kg, -2 * kr * (1 - kr) / kg], [1, 2 * (1 - kb), 0]]
    )
    low, luma_span, chroma_span = (0, 255, 255) if colour.full_range else (16, 219, 224)
    matrix *= np.array([255 / luma_span, 255 / chroma_span, 255 / chroma_span])
    offset = -matrix @ np.array([low, 128, 128])
    return np.hstack([matrix, offset[:, None]]).astype(np.float32)


@lru_cache(maxsize=16)
def swscale_tables(colour: Colour) -> tuple[np.ndarray, ...]:
    """The integer tables of FFmpeg's default Y'CbCr to BGR conversion, which OpenCV's reader uses.

    swscale's x86 code truncates every product, which darkens by about one level and decides the hue of
    near-black pixels; shot detectors tuned on OpenCV's frames see that, so the detector view repeats it.
    Source: libswscale/x86/yuv_2_rgb.asm (`pmulhw` of codes << 3 with coefficients << 13).

    Returns:
        int16 [256] each: Y' to all, Cb to B, Cb to G, Cr to G, Cr to R.
    """
    matrix = yuv_to_rgb(colour)[:, :3].astype(np.float64)
    low = 0 if colour.full_range else 16
    codes = np.arange(256)

    def table(coefficient: float, zero: int) -> np.ndarray:
        return ((8 * (codes - zero) * round(coefficient * 8192)) >> 16).astype(np.int16)

    return (
        table(matrix[0, 0], low),
        table(matrix[2, 1], 128),
        table(matrix[1, 1], 128),
        table(matrix[1, 2], 128),
        table(matrix[0, 2], 128),
    )


RGB_TO_LUMA_CODES = np.array([[0.2126, 0.7152, 0.0722]], np.float32) * (219 / 255)
"""R'G'B' 0..255 to BT.709 luma on the 16..235 scale, offset 16 not included."""
