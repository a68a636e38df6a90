"""Videos whose cuts, motion, colours, text and borders are known because the tests draw them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import av
import cv2
import numpy as np

KR_KB = {"bt709": (0.2126, 0.0722), "bt601": (0.299, 0.114), "bt2020": (0.2627, 0.0593)}
AV_SPACE = {"bt709": 1, "bt601": 6, "bt2020": 9}


def encode(
    path: Path | str,
    frames: Iterable[np.ndarray],
    fps: Fraction | float = 25,
    *,
    pts: Sequence[int] | None = None,
    time_base: Fraction | None = None,
    matrix: str = "bt709",
    full_range: bool = False,
    tagged: bool = True,
    codec: str = "libx264",
    pix_fmt: str = "yuv444p",
    options: dict[str, str] | None = None,
    rotation: int = 0,
    container_options: dict[str, str] | None = None,
    interlaced: bool = False,
) -> Path:
    """Encode uint8 RGB frames, losslessly unless `options` say otherwise.

    The colour conversion is done here, from the definition of the matrix, so that what a reader must give
    back is known. `pts` in units of `time_base` make variable frame rates and offsets.
    """
    rate = Fraction(fps).limit_denominator(1001)
    base = time_base or 1 / rate
    options = {"qp": "0", "preset": "ultrafast"} if options is None and codec == "libx264" else options or {}
    with _own_priority(), av.open(str(path), "w", options=container_options or {}) as container:
        stream = None
        for i, rgb in enumerate(frames):
            if stream is None:
                stream = container.add_stream(codec, rate=rate)
                stream.width, stream.height, stream.pix_fmt = rgb.shape[1], rgb.shape[0], pix_fmt
                stream.time_base = stream.codec_context.time_base = base
                stream.codec_context.options = options
                if tagged:
                    stream.codec_context.colorspace = AV_SPACE[matrix]
                    stream.codec_context.color_range = 2 if full_range else 1
                    stream.codec_context.color_primaries = stream.codec_context.color_trc = AV_SPACE[matrix]
                if rotation:
                    stream.set_display_rotation(rotation)
            frame = to_frame(rgb, matrix, full_range, pix_fmt)
            frame.pts = pts[i] if pts is not None else round(i / rate / base)
            frame.time_base = base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return Path(path)


@contextlib.contextmanager
def _own_priority() -> Iterator[None]:
    """SVT-AV1 makes a thread that encodes one of real time, if root runs it: all that this process starts later would
    have precedence over everything else on the machine."""
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def to_frame(rgb: np.ndarray, matrix: str, full_range: bool, pix_fmt: str) -> av.VideoFrame:
    planes = to_codes(rgb, matrix, full_range)
    if pix_fmt == "yuv444p10le":
        frame = av.VideoFrame(rgb.shape[1], rgb.shape[0], pix_fmt)
        for plane, data in zip(frame.planes, planes):
            fill(plane, data.astype(np.uint16) * 4)
        return frame
    if pix_fmt == "yuv444p":
        return av.VideoFrame.from_ndarray(np.stack(planes), format=pix_fmt)
    h, w = planes[0].shape
    half = [cv2.resize(p, (-(-w // 2), -(-h // 2)), interpolation=cv2.INTER_AREA) for p in planes[1:]]
    frame = av.VideoFrame(w, h, "yuv420p")
    for plane, data in zip(frame.planes, [planes[0], *half]):
        fill(plane, data)
    return frame if pix_fmt == "yuv420p" else frame.reformat(format=pix_fmt)


def fill(plane: av.video.plane.VideoPlane, data: np.ndarray) -> None:
    rows = np.zeros((data.shape[0], plane.line_size // data.itemsize), data.dtype)
    rows[:, : data.shape[1]] = data
    plane.update(rows.tobytes()[: plane.buffer_size].ljust(plane.buffer_size, b"\0"))


def to_codes(rgb: np.ndarray, matrix: str, full_range: bool) -> list[np.ndarray]:
    """Y', Cb, Cr codes by the definition in ITU-R BT.601/709."""
    kr, kb = KR_KB[matrix]
    luma = np.array([kr, 1 - kr - kb, kb])
    blue, red = np.array([0, 0, 1]), np.array([1, 0, 0])
    cb, cr = (blue - luma) / (2 * (1 - kb)), (red - luma) / (2 * (1 - kr))
    of_luma, of_chroma, black = (255, 255, 0) if full_range else (219, 224, 16)
    weights = np.stack([luma * of_luma, cb * of_chroma, cr * of_chroma]) / 255
    codes = cv2.transform(rgb.astype(np.float32), np.hstack([weights, [[black], [128], [128]]]))
    return list(cv2.split(cv2.convertScaleAbs(codes)))  # rounds to the nearest, clips at 255; none is negative


def texture(height: int, width: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    """A smooth random picture with detail at every size, uint8 RGB. `scale`: pixels per unit of detail."""
    rng = np.random.default_rng(seed)
    picture = np.zeros((height, width, 3), np.float32)
    for octave in (4, 8, 16, 32):
        cell = max(1, round(octave * scale))
        small = rng.normal(size=(height // cell + 2, width // cell + 2, 3)).astype(np.float32)
        picture += cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC) * octave
    return cv2.normalize(picture, None, 20, 235, cv2.NORM_MINMAX).astype(np.uint8)


def moving(
    height: int, width: int, fps: float, seconds: float, move: Callable[[float], np.ndarray], seed: int = 0
) -> list[np.ndarray]:
    """Frames of a texture seen through a moving window.

    Args:
        move: time in seconds -> 2x3 affine map from window to texture, in units of the frame height,
            origin at the centre.
    """
    size = 2 * max(height, width)
    world = _world(size, seed, height / 240)
    frames = []
    for i in range(round(fps * seconds)):
        affine = np.array(move(i / fps), np.float64)
        linear, shift = affine[:, :2], affine[:, 2] * height
        centre = np.array([width / 2, height / 2])
        offset = np.array([size / 2, size / 2]) + shift - linear @ centre
        full = np.hstack([linear, offset[:, None]])
        frames.append(cv2.warpAffine(world, full, (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP))
    return frames


@lru_cache(maxsize=4)  # one for each size that tests go through
def _world(size: int, seed: int, scale: float) -> np.ndarray:
    return texture(size, size, seed, scale)


def bars(height: int, width: int) -> np.ndarray:
    """Eight vertical colour bars, uint8 RGB."""
    colours = np.array(
        [
            [235, 235, 235],
            [200, 60, 40],
            [60, 180, 70],
            [40, 60, 190],
            [190, 190, 40],
            [170, 50, 160],
            [50, 170, 180],
            [30, 30, 30],
        ],
        np.uint8,
    )
    return np.repeat(np.repeat(colours[None], height, 0), -(-width // 8), 1)[:, :width]


def shots(lengths: Sequence[int], height: int = 120, width: int = 160) -> list[np.ndarray]:
    """Frames of still shots of different textures and tints; cuts lie after each length."""
    frames = []
    for seed, length in enumerate(lengths):
        picture = texture(height, width, seed).astype(np.float32)
        checks = np.add.outer(np.arange(height) // (height // 8), np.arange(width) // (height // 8)) % 2 == 0
        picture[checks] *= 0.4  # sharp edges
        tint = np.array([[1, 0.3, 0.3], [0.3, 1, 0.3], [0.3, 0.3, 1]][seed % 3], np.float32)
        frames += [(picture * tint).astype(np.uint8)] * length
    return frames
