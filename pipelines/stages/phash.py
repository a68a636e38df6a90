"""What a clip looks like, in a few bytes: perceptual hashes to find near-duplicates by, and a hash of its pictures.

A perceptual hash is 64 signs of low-frequency cosine coefficients of the luma picture inside black borders
(Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash Functions": pHash), here under a
sine window. The window is what makes it indifferent to what broadcasters paint into corners and to crops:
over 12 films (1225 frames, copies by ffmpeg) the mean distance to a copy fell from 6.4 bits to 2.5 with an
opaque corner logo and from 4.7 to 2.5 with 5 % cropped off; half size is 0.3 bits away, CRF 35 0.6, other
pictures 32 with a standard deviation of 5. A difference hash does as well on those, but tells no title cards
apart (3 bits between different cards, against 27).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from datakit.columns import Column
from datakit.hashing import hash_bytes
from pipelines.stages.base import FrameStage

if TYPE_CHECKING:
    from datakit.video.frame import Picture

THUMBNAIL_SIDE = 96
"""Longer side, in pixels, of what is kept of a frame until its clip, and so the crop box, is known."""
FREQUENCIES = 8
"""Cosines per direction: 8 × 8 coefficients, of which the first, the mean, gives way to the ninth of a row."""
LEAST_CONTRAST = 3.0
"""Standard deviation of luma codes below which a frame shows nothing: the bits would be those of codec noise
(fades to black, blank screens). At 3 the hash of a dimmed picture is 1 bit from the original's."""
ZERO = 1e-6
"""A coefficient below this many luma codes counts as zero, so that rounding decides nothing."""


@dataclass(frozen=True, slots=True)
class FrameHash:
    """`digest` of the luma view, 16 bytes; `thumbnail` of it, uint8 [h, w]; size of the frame for display."""

    digest: bytes
    thumbnail: np.ndarray
    width: int
    height: int


class PHash(FrameStage):
    """Perceptual hashes and a hash of the pictures, for `run dedup`.

    A clip in which nothing can be seen has an empty `phash`.
    """

    name = "phash"
    version = "1"
    order = 70
    columns = (
        Column("phash", "binary", "", "perceptual hashes: 8 bytes for every grid frame that shows something"),
        Column(
            "content_hash",
            "binary",
            "",
            "hash of the grid frames' pictures: equal for the same pictures in another file",
        ),
    )
    upstream = ("letterbox",)
    uses = ("crop_x", "crop_y", "crop_width", "crop_height")

    def frame(self, picture: Picture) -> FrameHash:
        luma = picture.luma()
        digest = hashlib.blake2b(repr(luma.shape).encode(), digest_size=16, person=b"datakit-picture")
        digest.update(np.ascontiguousarray(luma))  # of 360 lines it is the decoder's own plane, padded
        return FrameHash(digest.digest(), _thumbnail(luma), picture.geometry.width, picture.geometry.height)

    def summarise(
        self,
        frames: Sequence[FrameHash],
        crop_x: int | None = None,
        crop_y: int | None = None,
        crop_width: int | None = None,
        crop_height: int | None = None,
    ) -> dict[str, object]:
        """Args:
        crop_x, crop_y, crop_width, crop_height: the picture inside black borders, in display pixels; None: all of it.
        """
        if not frames:
            return {"phash": b"", "content_hash": None}
        content = hash_bytes(b"".join(f.digest for f in frames), 16)
        box = None if crop_width is None else (crop_x, crop_y, crop_x + crop_width, crop_y + crop_height)
        return {"phash": b"".join(_hash(f, box) for f in frames), "content_hash": content}


def picture_hash(
    thumbnail: np.ndarray, left: float = 0.0, top: float = 0.0, right: float = 1.0, bottom: float = 1.0
) -> bytes:
    """The perceptual hash of a luma picture.

    Args:
        thumbnail: luma codes [h, w].
        left, top, right, bottom: the part of it that is hashed, as shares of its sides.

    Returns:
        8 bytes; none when the part shows nothing (`LEAST_CONTRAST`).
    """
    h, w = thumbnail.shape
    rows, columns = _basis(h, top * h, bottom * h), _basis(w, left * w, right * w)
    inside = thumbnail[_whole(top * h, bottom * h), _whole(left * w, right * w)]
    if inside.std() < LEAST_CONTRAST:
        return b""
    flat = np.outer(rows.sum(1), columns.sum(1))  # the coefficients of a picture that is 1 everywhere
    found = rows @ thumbnail.astype(np.float64) @ columns.T
    found -= found[0, 0] / flat[0, 0] * flat
    signs = found[:FREQUENCIES, :FREQUENCIES] > ZERO
    signs[0, 0] = found[0, FREQUENCIES] > ZERO
    return np.packbits(signs).tobytes()


def _hash(frame: FrameHash, box: tuple[int, int, int, int] | None) -> bytes:
    x0, y0, x1, y1 = box or (0, 0, frame.width, frame.height)
    return picture_hash(frame.thumbnail, x0 / frame.width, y0 / frame.height, x1 / frame.width, y1 / frame.height)


def _thumbnail(luma: np.ndarray) -> np.ndarray:
    """Scaled down by means over areas, in two steps because halving is cheap."""
    import cv2

    from datakit.video.frame import fit

    h, w = luma.shape
    size = fit(w, h, THUMBNAIL_SIDE)
    if size[0] <= w // 2:
        luma = cv2.resize(luma, (w // 2, h // 2), interpolation=cv2.INTER_AREA)
    return cv2.resize(luma, size, interpolation=cv2.INTER_AREA)


@lru_cache(maxsize=64)
def _basis(pixels: int, start: float, end: float) -> np.ndarray:
    """Windowed cosines over the part [start, end) of a line of pixels: [FREQUENCIES + 1, pixels].

    The box need not lie on pixel borders: each pixel weighs as much as lies inside.
    """
    low, high = np.clip(np.arange(pixels), start, end), np.clip(np.arange(1, pixels + 1), start, end)
    place = ((low + high) / 2 - start) / (end - start)
    window = np.sin(np.pi * place) * (high - low) / (end - start)
    return np.cos(np.pi * np.arange(FREQUENCIES + 1)[:, None] * place) * window


def _whole(start: float, end: float) -> slice:
    """The pixels that lie inside wholly, at least one."""
    first = min(int(np.ceil(start)), int(end))
    return slice(first, max(first + 1, int(end)))
