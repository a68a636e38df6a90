"""Videos to files: H.264 that plays everywhere, lossless for measuring, GIF, or pictures. Whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np

from datakit.atomic import atomic_folder, atomic_path
from datakit.errors import ErrorKind, MediaError
from datakit.video.writer import VideoWriter

Format = Literal["mp4", "lossless", "gif", "frames"]
SUFFIXES: dict[str, str] = {"mp4": ".mp4", "lossless": ".mkv", "gif": ".gif", "frames": ""}
CATALOGUED: tuple[Format, ...] = ("mp4", "lossless")
"""Forms that a catalog's stages can read."""
GIF_TICK_S = 0.01
"""GIF's unit of time."""


def write(pixels: np.ndarray, path: Path, fps: float, form: Format = "mp4", crf: int = 16) -> Path:
    """Write a video.

    Args:
        pixels: uint8 R'G'B' [T, h, w, 3]. One frame in form mp4 is a video of one frame.
        path: without suffix; `frames` makes it a folder of `00000.png` …
        fps: frames per second.

    Returns:
        the path written.

    Raises:
        MediaError: the encoder or the disk does not take it.
    """
    target = path.with_name(path.name + SUFFIXES[form])
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with (atomic_path if SUFFIXES[form] else atomic_folder)(target) as aside:
            _WRITERS[form](pixels, aside, fps, crf)
    except OSError as e:
        raise MediaError(ErrorKind.ENCODE, f"cannot write {target}: {e.strerror or e}", "sample") from e
    return target


def _video(pixels: np.ndarray, path: Path, fps: float, crf: int, lossless: bool = False) -> None:
    step = 1 / Fraction(fps).limit_denominator(1001)
    with VideoWriter(path, pixels.shape[2], pixels.shape[1], step, fps, crf, lossless=lossless) as writer:
        for i, picture in enumerate(pixels):
            writer.write_rgb(picture, i)


def _lossless(pixels: np.ndarray, path: Path, fps: float, crf: int) -> None:
    _video(pixels, path, fps, crf, lossless=True)


def _gif(pixels: np.ndarray, path: Path, fps: float, crf: int) -> None:
    from PIL import Image

    first, *others = (Image.fromarray(picture).quantize(256) for picture in pixels)
    ticks = np.round(np.arange(len(pixels) + 1) / fps / GIF_TICK_S).astype(int)
    lasts = [int(ms) for ms in np.diff(ticks) * round(GIF_TICK_S * 1000)]
    first.save(path, format="GIF", save_all=True, append_images=others, duration=lasts if others else lasts[0], loop=0)


def _frames(pixels: np.ndarray, path: Path, fps: float, crf: int) -> None:
    for i, picture in enumerate(pixels):
        write_picture(picture, path / f"{i:05d}.png")


def write_picture(picture: np.ndarray, path: Path) -> None:
    """uint8 R'G'B' [h, w, 3] to a PNG.

    Raises:
        OSError: the disk does not take it.
    """
    import cv2

    done, png = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    assert done
    path.write_bytes(png.tobytes())


_WRITERS: dict[str, Callable[[np.ndarray, Path, float, int], None]] = {
    "mp4": _video,
    "lossless": _lossless,
    "gif": _gif,
    "frames": _frames,
}
