"""Black borders: the crop box of the picture inside letterbox or pillarbox bars.

A bar is flat and black, has a straight edge along the whole side, and stays where it is for the whole
clip. A dark scene has none of that: its black region ends at another line in every frame, or is not
straight, or is everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from datakit.columns import Column
from pipelines.stages.base import FrameStage

if TYPE_CHECKING:
    from datakit.video.frame import Geometry, Picture

BLACK_CODE = 16 + 16
"""Highest luma code (16..235 scale) still black: FFmpeg's cropdetect uses 24 on the mean of a line; a
bar's brightest pixel carries some ringing and noise."""
SPARSE = 4
"""Along a line every fourth pixel is looked at."""
SPECKS = 0.01
"""Share of a black line's pixels that may be brighter."""
LONGEST_BAR = 0.45
"""A bar covers at most this share of the side."""
SMALLEST_BAR = 0.01
"""Thinner borders are left alone (in many sources they are half-black edge lines of the scan)."""
EDGE_COVERAGE = 0.3
"""Share of a bar's edge line that must be bright, in the frames that show the edge, for it to be straight."""
AGREEMENT = 0.3
"""Share of the clip's frames that must show the bar's edge at the very line."""


@dataclass(frozen=True, slots=True)
class Bars:
    """Black lines at each side of one frame, in stored pixels, and how bright the line behind them is.

    Order: top, bottom, left, right. `coverage` is the share of pixels of the first lines behind the bar
    that are not black.
    """

    width: tuple[int, int, int, int]
    coverage: tuple[float, float, float, float]


class Letterbox(FrameStage):
    """The picture inside bars that stay for the whole clip."""

    name = "letterbox"
    version = "1"
    order = 50
    columns = (
        Column("crop_x", "int32", "px", "picture inside black borders: left", shown=False),
        Column("crop_y", "int32", "px", "picture inside black borders: top", shown=False),
        Column("crop_width", "int32", "px", "picture inside black borders", shown=False),
        Column("crop_height", "int32", "px", "picture inside black borders", shown=False),
    )

    def frame(self, picture: Picture) -> tuple[Bars, Geometry]:
        luma = picture.full_luma()
        limit = _black_limit(picture.geometry)
        rows, columns = luma[:, ::SPARSE], luma[::SPARSE].T
        found = [_bar(lines, limit) for lines in (rows, rows[::-1], columns, columns[::-1])]
        return Bars(tuple(w for w, _ in found), tuple(c for _, c in found)), picture.geometry

    def summarise(self, frames: Sequence[tuple[Bars, Geometry]]) -> dict[str, object]:
        if not frames:
            return self.nothing()
        g = frames[0][1]
        sides = [
            _stable_bar(
                [b.width[i] for b, _ in frames],
                [b.coverage[i] for b, _ in frames],
                g.stored_height if i < 2 else g.stored_width,
            )
            for i in range(4)
        ]
        return dict(zip(self.column_names(), _crop_box(sides, g)))


def _black_limit(g: Geometry) -> float:
    codes = BLACK_CODE if g.layout != "rgb" and not g.colour.full_range else (BLACK_CODE - 16) * 255 / 219
    return codes * (1 << g.shift)


def _bar(lines: np.ndarray, limit: float) -> tuple[int, float]:
    """How many leading lines are black, and the share of the lines right behind them that is not."""
    if (lines[0] > limit).mean() > SPECKS:  # no bar here: the common case
        return 0, 1.0
    reach = max(1, int(len(lines) * LONGEST_BAR))
    step = 16
    for start in range(0, reach, step):
        block = lines[start : min(start + step, reach)]
        bright = (block > limit).mean(axis=1) > SPECKS
        if bright.any():
            width = start + int(np.argmax(bright))
            behind = lines[width : width + 3]  # scaling blurs the edge over a line or two
            return width, float((behind > limit).mean(axis=1).max()) if width else 1.0
    return reach, 0.0


def _stable_bar(widths: list[int], coverages: list[float], side: int) -> int:
    """The bar that all frames share, or 0.

    The narrowest black region of any frame is the candidate. Enough of the frames must end right there
    (within a line or two) with a straight bright edge.
    """
    width = min(widths)
    if width < max(2, SMALLEST_BAR * side):
        return 0
    tolerance = max(2, round(0.005 * side))
    showing = [c for w, c in zip(widths, coverages) if w <= width + tolerance]
    straight = [c for c in showing if c >= EDGE_COVERAGE]
    return width if len(straight) >= AGREEMENT * len(widths) else 0


def _crop_box(sides: list[int], g: Geometry) -> tuple[int, int, int, int]:
    """x, y, width, height in display pixels, even numbers, from bars in stored pixels."""
    top, bottom, left, right = sides
    turned = {
        0: (top, bottom, left, right),
        90: (right, left, top, bottom),
        180: (bottom, top, right, left),
        270: (left, right, bottom, top),
    }[g.rotation]
    top, bottom, left, right = turned
    lines, columns = (g.stored_width, g.stored_height) if g.rotation % 180 else (g.stored_height, g.stored_width)
    y_scale, x_scale = g.height / lines, g.width / columns
    x0, x1 = _even_inside(left * x_scale, g.width - right * x_scale, g.width)
    y0, y1 = _even_inside(top * y_scale, g.height - bottom * y_scale, g.height)
    return x0, y0, x1 - x0, y1 - y0


def _even_inside(low: float, high: float, full: int) -> tuple[int, int]:
    """Even bounds inside [low, high]; the whole side (which may be odd) stays whole."""
    start = 0 if low <= 0 else -(-int(np.ceil(low)) // 2) * 2
    end = full if high >= full else start + (int(high) - start) // 2 * 2
    return start, end
