"""The perceptual hash against its definition, pixel by pixel."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest

from pipelines.stages.phash import FrameHash, PHash, picture_hash
from support.pictures import picture


def weights(pixels: int, start: float, end: float) -> np.ndarray:
    """[9, pixels]: cosines of frequency 0 to 8 under a sine window over [start, end), times the share of the part that
    lies in a pixel; both at the middle of what lies in it."""
    table = np.zeros((9, pixels))
    for pixel in range(pixels):
        low, high = max(pixel, start), min(pixel + 1, end)
        if low < high:
            place = ((low + high) / 2 - start) / (end - start)
            share = math.sin(math.pi * place) * (high - low) / (end - start)
            table[:, pixel] = [math.cos(math.pi * k * place) * share for k in range(9)]
    return table


def defined(codes: np.ndarray, left=0.0, top=0.0, right=1.0, bottom=1.0) -> bytes:
    """Signs of the 8 x 8 lowest coefficients of the picture less its (windowed) mean, rows first; the first, that mean,
    gives way to the ninth of the first row."""
    h, w = codes.shape
    y, x = weights(h, top * h, bottom * h), weights(w, left * w, right * w)
    mean = y[0] @ codes @ x[0] / (y[0].sum() * x[0].sum())
    coefficients = np.array([[a @ (codes - mean) @ b for b in x] for a in y])
    bits = [c > 1e-6 for row in coefficients[:8] for c in row[:8]]
    bits[0] = coefficients[0, 8] > 1e-6
    return bytes(int("".join(str(int(b)) for b in bits[i : i + 8]), 2) for i in range(0, 64, 8))


PART = {"left": 0.13, "top": 0.21, "right": 0.77, "bottom": 0.88}


@pytest.mark.parametrize("part", [{}, PART, {"left": 0.5}, {"bottom": 0.5}], ids=["all", "part", "right", "top"])
@pytest.mark.parametrize("shape", [(54, 96), (30, 20), (9, 40)])
def test_the_hash_is_the_signs_of_low_frequencies(shape, part):
    for seed in range(4):
        codes = np.random.default_rng(seed).integers(120, 250, shape).astype(np.uint8)
        assert picture_hash(codes, **part) == defined(codes.astype(float), **part)


def test_a_picture_of_one_frequency():
    """Darker to the right: of the coefficients that are 0 by symmetry, rounding decides nothing."""
    x = (np.arange(96) + 0.5) / 96
    codes = np.tile(128 + 100 * np.cos(np.pi * x), (54, 1))
    assert picture_hash(codes) == defined(codes)
    rows = np.unpackbits(np.frombuffer(picture_hash(codes), np.uint8)).reshape(8, 8)
    assert rows[0].tolist() == [0, 1, 0, 0, 0, 0, 0, 0] and not rows[1::2].any()


def test_brightness_and_contrast_do_not_matter():
    codes = np.random.default_rng(1).integers(0, 100, (54, 96)).astype(np.float64)
    assert picture_hash(codes) == picture_hash(codes / 2) == picture_hash(codes + 150)


def halves(low: float, high: float) -> np.ndarray:
    return np.repeat([low, high], 48)[None].repeat(54, 0)


def test_three_codes_of_contrast_are_needed():
    """Standard deviations 2.9, 3 and 3.1."""
    assert [len(picture_hash(halves(100 - d, 100 + d))) for d in (2.9, 3.0, 3.1)] == [0, 8, 8]
    assert picture_hash(halves(100, 100)) == b""


def test_contrast_counts_where_a_pixel_lies_inside_as_a_whole():
    """Of 20 pixels those from 4.5 to 15.5: the fifth to the fifteenth."""
    part = {"left": 0.225, "top": 0.225, "right": 0.775, "bottom": 0.775}
    for row, inside in ((4, False), (5, True), (14, True), (15, False)):
        for codes in (np.zeros((20, 20)), np.zeros((20, 20))):
            codes[row] = 250
            assert bool(picture_hash(codes, **part)) is bool(picture_hash(codes.T, **part)) is inside, row


def test_a_part_within_a_pixel_shows_nothing():
    codes = np.arange(400.0).reshape(20, 20) * 5 % 256
    for start, end in ((4.2, 4.8), (4.0, 4.9), (4.0, 5.0), (4.5, 5.0)):
        assert picture_hash(codes, start / 20, start / 20, end / 20, end / 20) == b""
    assert len(picture_hash(codes, 0.2, 0.2, 0.3, 0.3)) == 8


def shrunk(codes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Means over areas, [height, width]."""

    def shares(pixels: int, parts: int) -> np.ndarray:
        edges = np.arange(parts + 1) * pixels / parts
        low, high = (
            np.maximum.outer(edges[:-1], np.arange(pixels)),
            np.minimum.outer(edges[1:], np.arange(1, pixels + 1)),
        )
        return np.clip(high - low, 0, None) * parts / pixels

    return shares(codes.shape[0], height) @ codes @ shares(codes.shape[1], width).T


@pytest.mark.parametrize("width, kept", [(640, (54, 96)), (360, (96, 96)), (60, (96, 16)), (2, (96, 1))])
def test_of_a_frame_a_thumbnail_is_kept(width, kept):
    """Its longer side is 96 of luma's 360 lines. Halved first, so rounded twice."""
    luma = np.random.default_rng(2).integers(0, 256, (360, width)).astype(np.uint8)
    frame = PHash().frame(picture(luma))
    assert (frame.width, frame.height) == (width, 360) and frame.thumbnail.shape == kept
    codes = luma.astype(float)
    once, twice = shrunk(codes, *kept), shrunk(np.floor(shrunk(codes, 180, width // 2) + 0.5), *kept)
    assert np.mean(np.rint(twice) == frame.thumbnail) > 0.99 > np.mean(np.rint(once) == frame.thumbnail)


def test_a_line_of_pixels_is_not_halved():
    luma = np.random.default_rng(2).integers(0, 256, (360, 1)).astype(np.uint8)
    thumbnail = PHash().frame(picture(luma)).thumbnail
    assert thumbnail.shape == (96, 1) and np.array_equal(np.rint(shrunk(luma.astype(float), 96, 1)), thumbnail)


@pytest.mark.parametrize("width", [640, 480, 426])
def test_frames_are_digested_by_shape_and_codes(width):
    """Also where a decoder pads the lines of its picture."""
    luma = np.random.default_rng(3).integers(0, 256, (360, width)).astype(np.uint8)
    digest = hashlib.blake2b(
        f"(360, {width})".encode() + luma.tobytes(), digest_size=16, person=b"datakit-picture"
    ).digest()
    assert PHash().frame(picture(luma)).digest == digest


def test_a_clip_has_the_hashes_of_its_frames():
    rng = np.random.default_rng(4)
    thumbnails = [rng.integers(0, 256, (20, 30)).astype(np.uint8) for _ in range(3)]
    frames = [FrameHash(bytes([i]) * 16, t, 300, 200) for i, t in enumerate(thumbnails)]
    found = PHash().summarise(frames)
    assert found["phash"] == b"".join(defined(t.astype(float)) for t in thumbnails)
    assert found["content_hash"] == hashlib.blake2b(b"\0" * 16 + b"\1" * 16 + b"\2" * 16, digest_size=16).digest()
    cropped = PHash().summarise(frames, crop_x=15, crop_y=20, crop_width=120, crop_height=90)
    shares = {"left": 0.05, "top": 0.1, "right": 0.45, "bottom": 0.55}
    assert cropped["phash"] == b"".join(defined(t.astype(float), **shares) for t in thumbnails) != found["phash"]
    assert cropped["content_hash"] == found["content_hash"]
    assert PHash().summarise([]) == {"phash": b"", "content_hash": None}
