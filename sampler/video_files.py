"""Videos to files: H.264 that plays everywhere, lossless for measuring, GIF, or pictures. Whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np

from datakit.atomic import atomic_folder, atomic_path
from datakit.errors import ErrorKind, MediaError
from datakit.video.writer import FFV1, H264, Encoding, VideoWriter

GIF_TICK_S = 0.01
"""GIF's unit of time."""
Write = Callable[[np.ndarray, Path, float, int], None]
"""Pixels, path, frames per second, constant rate factor."""


@dataclass(frozen=True)
class VideoFormat:
    """A form that samples are written in.

    Attributes:
        suffix: of the file; "": a folder.
        write: writes it.
        bits: of a file for each pixel of a video, at most, of what models make.
        catalogued: whether a catalog's stages can read it.
        played: whether browsers play it without help.
    """

    suffix: str
    write: Write
    bits: float
    catalogued: bool = False
    played: bool = False


def write(pixels: np.ndarray, path: Path, fps: float, form: str = "mp4", crf: int = 16) -> Path:
    """Write a video.

    Args:
        pixels: uint8 R'G'B' [T, h, w, 3]. One frame in form mp4 is a video of one frame.
        form: one of `FORMATS`.
        path: without suffix; `frames` makes it a folder of `00000.png` …
        fps: frames per second.

    Returns:
        the path written.

    Raises:
        MediaError: the encoder or the disk does not take it.
    """
    form_of = FORMATS[form]
    target = path.with_name(path.name + form_of.suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with (atomic_path if form_of.suffix else atomic_folder)(target) as aside:
            form_of.write(pixels, aside, fps, crf)
    except OSError as e:
        raise MediaError(ErrorKind.ENCODE, f"cannot write {target}: {e.strerror or e}", "sample") from e
    return target


def _video(pixels: np.ndarray, path: Path, fps: float, crf: int, encoding: Encoding) -> None:
    step = 1 / Fraction(fps).limit_denominator(1001)
    with VideoWriter(path, pixels.shape[2], pixels.shape[1], step, fps, crf, encoding) as writer:
        for i, picture in enumerate(pixels):
            writer.write_rgb(picture, i)


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


FORMATS: dict[str, VideoFormat] = {
    "mp4": VideoFormat(".mp4", partial(_video, encoding=H264), 0.25, catalogued=True, played=True),
    "lossless": VideoFormat(".mkv", partial(_video, encoding=FFV1), 12.0, catalogued=True),
    "gif": VideoFormat(".gif", _gif, 8.0),
    "frames": VideoFormat("", _frames, 16.0),
}
"""By name in settings. H.264: natural footage at crf 16 takes 0.1 to 0.2 bits a pixel."""


def is_played(file: str | Path) -> bool:
    """Whether browsers play a sample's file without help."""
    return Path(file).suffix.lower() in {form.suffix for form in FORMATS.values() if form.played}
