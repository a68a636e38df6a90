"""A decoded frame and the small views of it that measurements need.

Planes are scaled first and converted after: resampling and the colour matrix are both linear, and a
matrix over 256x144 pixels costs a fiftieth of one over 1080p. Views are oriented for display (rotation
and pixel aspect applied) unless they say otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import av
import cv2
import numpy as np

from datakit.video.color import RGB_TO_LUMA_CODES, Colour, swscale_tables, yuv_to_rgb

IMAGE_SIDE = 640
"""Longer side, in pixels, of the pictures that image stages see (never enlarged)."""
DETECT_SIDE = 256
"""Longer side of the pictures that shot detectors see: PySceneDetect's automatic downscale."""
LUMA_LINES = 360
"""Height of the luma picture that the motion (VMAF) and sharpness measurements see."""

# Formats that are not planar Y'CbCr in native byte order, and the lossless planar twin they are read as.
_PLANAR_TWIN = {
    "nv12": "yuv420p",
    "nv21": "yuv420p",
    "p010le": "yuv420p10le",
    "yuyv422": "yuv422p",
    "uyvy422": "yuv422p",
}


@dataclass(frozen=True, slots=True)
class Geometry:
    """What all frames of a stream share: sizes in pixels, orientation, colour, sample layout."""

    stored_width: int
    stored_height: int
    width: int  # for display: after pixel aspect and rotation
    height: int
    rotation: int  # degrees counter-clockwise to turn the stored picture by: 0, 90, 180, 270
    colour: Colour
    layout: str  # "yuv": planar Y'CbCr, "gray": Y' only, "rgb"
    twin: str | None  # pixel format to convert to before planes can be read
    shift: int  # bits above 8

    @classmethod
    def of(cls, frame: av.VideoFrame, pixel_aspect: float = 1.0) -> Geometry:
        rotation = round(frame.rotation / 90) * 90 % 360
        width, height = display_size(frame.width, frame.height, pixel_aspect, rotation)
        layout, twin = _layout(frame.format)
        bits = av.VideoFormat(twin).components[0].bits if twin else frame.format.components[0].bits
        shift = max(0, bits - 8) if layout != "rgb" else 0
        return cls(frame.width, frame.height, width, height, rotation, Colour.of(frame), layout, twin, shift)


def display_size(width: int, height: int, pixel_aspect: float, rotation: int) -> tuple[int, int]:
    """Width and height in square pixels as a viewer sees them."""
    width = max(1, round(width * pixel_aspect))
    return (height, width) if rotation % 180 else (width, height)


def fit(width: int, height: int, longer_side: int) -> tuple[int, int]:
    """(width, height) scaled down so that the longer side is at most `longer_side`; never up."""
    scale = max(width, height) / longer_side
    if scale <= 1:
        return width, height
    return max(1, round(width / scale)), max(1, round(height / scale))


class Picture:
    """One decoded frame. Views are uint8; those used more than once are computed once.

    Attributes:
        pts: presentation timestamp, in the stream's time base.
        duration: in the same unit, 0 when unknown.
        index: position in decoding order of display, or -1 after a seek.
    """

    __slots__ = ("frame", "geometry", "pts", "duration", "index", "_planes", "_detect", "_luma")

    def __init__(self, frame: av.VideoFrame, geometry: Geometry, pts: int, duration: int, index: int):
        self.frame = frame
        self.geometry = geometry
        self.pts = pts
        self.duration = duration
        self.index = index
        self._planes: tuple[np.ndarray, ...] | None = None
        self._detect: tuple[np.ndarray, np.ndarray] | None = None
        self._luma: np.ndarray | None = None

    def planes(self) -> tuple[np.ndarray, ...]:
        """Full-size sample planes as stored, without copying: (Y, U, V), (Y,) or one RGB array."""
        if self._planes is None:
            self._planes = _read_planes(self.frame, self.geometry)
        return self._planes

    def detector_view(self) -> tuple[np.ndarray, np.ndarray]:
        """What PySceneDetect would see, as stored (not rotated): BGR [h, w, 3] and Y' [h, w].

        The longer side is `DETECT_SIDE` (or the frame's own when smaller). Luma is scaled bilinearly,
        chroma taken at the nearest sample and converted in FFmpeg's integer arithmetic: OpenCV's reader
        followed by PySceneDetect's downscale gives the same pixels, or nearly (within 0.2 levels on
        average), at a tenth of the cost.
        """
        if self._detect is None:
            g = self.geometry
            size = fit(g.stored_width, g.stored_height, DETECT_SIDE)
            first = _scale(self.planes()[0], size, cv2.INTER_LINEAR)
            if g.layout == "rgb":
                bgr = np.ascontiguousarray(first[..., ::-1])
                self._detect = bgr, cv2.cvtColor(bgr, cv2.COLOR_BGR2GRAY)
            else:
                y = self._eight_bit(first)
                self._detect = self._swscale_bgr(y, size), y
        return self._detect

    def luma(self) -> np.ndarray:
        """Luma codes on the 16..235 scale at `LUMA_LINES` lines, without aliasing. uint8 [360, w]."""
        if self._luma is None:
            g = self.geometry
            width = max(1, round(g.width * LUMA_LINES / g.height))
            size = (LUMA_LINES, width) if g.rotation % 180 else (width, LUMA_LINES)
            if g.layout == "rgb":
                rgb = _shrink(self.planes()[0], size)
                luma = _round(cv2.transform(rgb.astype(np.float32), RGB_TO_LUMA_CODES) + 16)
            else:
                luma = self._eight_bit(_shrink(self.planes()[0], size))
                if g.colour.full_range:
                    luma = _round(luma.astype(np.float32) * (219 / 255) + 16)
            self._luma = _turn(luma, g.rotation)
        return self._luma

    def rgb(self, longer_side: int | None = None) -> np.ndarray:
        """Full-range R'G'B', tags respected. uint8 [h, w, 3], oriented for display.

        Args:
            longer_side: scale down so that the longer side is at most this many pixels.
        """
        g = self.geometry
        width, height = (g.width, g.height) if longer_side is None else fit(g.width, g.height, longer_side)
        size = (height, width) if g.rotation % 180 else (width, height)
        planes = [_shrink(plane, size) for plane in self.planes()]
        if g.layout == "rgb":
            return _turn(planes[0], g.rotation)
        y, u, v = (self._eight_bit(p) for p in planes) if len(planes) == 3 else self._grey(planes[0])
        return _turn(cv2.transform(cv2.merge((y, u, v)), yuv_to_rgb(g.colour)), g.rotation)

    def full_luma(self) -> np.ndarray:
        """Luma as stored: full size, not rotated, native codes and depth. [h, w]; RGB gives its green."""
        plane = self.planes()[0]
        return plane[..., 1] if plane.ndim == 3 else plane

    def _grey(self, luma: np.ndarray) -> tuple[np.ndarray, ...]:
        neutral = np.full(luma.shape, 128, np.uint8)
        return self._eight_bit(luma), neutral, neutral

    def _swscale_bgr(self, y: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        y_all, u_blue, u_green, v_green, v_red = swscale_tables(self.geometry.colour.as_opencv)
        planes = self.planes()
        luma = cv2.LUT(y, y_all)
        if len(planes) == 1:
            grey = cv2.add(luma, np.zeros_like(luma), dtype=cv2.CV_8U)
            return cv2.merge((grey, grey, grey))
        # The sample under the centre of each pixel: swscale repeats chroma samples, it does not blend them.
        u, v = (self._eight_bit(_scale(p, size, cv2.INTER_NEAREST_EXACT)) for p in planes[1:])
        green = cv2.add(cv2.LUT(u, u_green), cv2.LUT(v, v_green))
        parts = (cv2.LUT(u, u_blue), green, cv2.LUT(v, v_red))
        return cv2.merge([cv2.add(luma, part, dtype=cv2.CV_8U) for part in parts])

    def _eight_bit(self, plane: np.ndarray) -> np.ndarray:
        shift = self.geometry.shift
        return cv2.convertScaleAbs(plane, alpha=1 / (1 << shift)) if shift else plane


def _layout(fmt: av.VideoFormat) -> tuple[str, str | None]:
    name = fmt.name
    if fmt.is_rgb or name in ("pal8", "monob", "monow"):
        return "rgb", None if name == "rgb24" else "rgb24"
    if name in ("gray", "gray8"):
        return "gray", None
    if name.startswith("gray"):
        return "gray", "gray"
    if name.startswith("yuv") and fmt.is_planar and not fmt.is_big_endian:
        return "yuv", None
    return "yuv", _PLANAR_TWIN.get(name, "yuv444p")


def _read_planes(frame: av.VideoFrame, g: Geometry) -> tuple[np.ndarray, ...]:
    if g.twin:
        frame = frame.reformat(format=g.twin)
    if g.layout == "rgb":
        plane = frame.planes[0]
        rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
        return (rows[: frame.height, : frame.width * 3].reshape(frame.height, frame.width, 3),)
    dtype = np.uint16 if g.shift else np.uint8
    planes = []
    for plane in frame.planes[: 1 if g.layout == "gray" else 3]:  # a fourth one is alpha
        rows = np.frombuffer(memoryview(plane), dtype).reshape(-1, plane.line_size // dtype().itemsize)
        planes.append(rows[: plane.height, : plane.width])
    return tuple(planes)


def _shrink(plane: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scale without aliasing: halve by 2x2 means while larger than twice the size, then bilinear.

    A third of the cost of area averaging at 1080p, and the same filter at every resolution.
    """
    while plane.shape[1] >= 2 * size[0] and plane.shape[0] >= 2 * size[1]:
        plane = cv2.resize(plane, (plane.shape[1] // 2, plane.shape[0] // 2), interpolation=cv2.INTER_AREA)
    return _scale(plane, size, cv2.INTER_LINEAR)


def _scale(plane: np.ndarray, size: tuple[int, int], interpolation: int) -> np.ndarray:
    if plane.shape[1::-1] == size:
        return plane
    return cv2.resize(plane, size, interpolation=interpolation)


def _turn(image: np.ndarray, rotation: int) -> np.ndarray:
    return np.ascontiguousarray(np.rot90(image, rotation // 90)) if rotation else image


def _round(image: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)
