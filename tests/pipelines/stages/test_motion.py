"""Motion between pictures whose flow is known, and camera moves made from their definition."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
import pytest

from pipelines.stages.motion import CameraMove, FlowSample, Motion, MotionVmaf, camera_label, camera_moves
from support.drawn_videos import texture
from support.pictures import picture


def shifted(right: int, down: int = 0) -> np.ndarray:
    """A window of 360 x 640 into a larger picture, whose content moves by so many pixels."""
    return texture(440, 720, 1)[40 - down : 400 - down, 40 - right : 680 - right, 1].copy()


def sample(size: tuple[int, int], u: Sequence[float] | np.ndarray, v: Sequence[float] | np.ndarray, seconds=0.1):
    u, v = np.asarray(u, np.float32), np.asarray(v, np.float32)
    return FlowSample(float(np.hypot(u, v).mean()), np.concatenate([u, v]), size, seconds)


def test_pixels_become_percent_of_the_diagonal_per_second():
    """Sides 300 and 400, diagonal 500: a pixel in a tenth of a second is 2 % a second."""
    assert FlowSample(1.0, np.zeros(0), (300, 400), 0.1).percent_per_second == pytest.approx(2.0)
    assert FlowSample(1.0, np.zeros(0), (30, 40), 0.5).percent_per_second == pytest.approx(4.0)


@pytest.mark.parametrize("method", ["dis", "farneback"])
def test_the_flow_of_a_pair_is_in_pixels_of_256(method):
    """10 and 5 pixels of 640 are 4 and 2 of 256."""
    flow = Motion(method).pair(picture(shifted(0)), picture(shifted(10, -5)), 0.25)
    assert flow.size == (144, 256) and flow.seconds == 0.25
    right, down = flow.vectors.reshape(2, 18, 32)[:, 3:-3, 3:-3]
    assert np.median(right) == pytest.approx(4, rel=0.05) and np.median(down) == pytest.approx(-2, rel=0.05)
    assert flow.length == pytest.approx(math.hypot(4, 2), rel=0.15)


def test_farneback_has_the_settings_of_opencvs_example():
    first, second = shifted(0), shifted(10, -5)
    a, b = (cv2.resize(image, (256, 144)) for image in (first, second))
    named = {"pyr_scale": 0.5, "levels": 3, "winsize": 15, "iterations": 3, "poly_n": 5, "poly_sigma": 1.2, "flags": 0}
    expected = cv2.calcOpticalFlowFarneback(a, b, flow=None, **named)
    flow = Motion("farneback").pair(picture(first), picture(second), 1.0)
    assert flow.length == pytest.approx(np.linalg.norm(expected, axis=2).mean(), rel=1e-5)
    assert np.allclose(flow.vectors[: 18 * 32], expected[4::8, 4::8, 0].ravel(), atol=1e-5)


def test_what_dis_cannot_take_farneback_takes():
    """Pictures under 16 pixels wide, and pictures of two shapes."""
    narrow = Motion().pair(picture(shifted(0)[:, :10]), picture(shifted(0)[:, :10]), 1.0)
    assert narrow.size == (256, 7) and narrow.length < 1
    other = Motion().pair(picture(shifted(0)[:, :480]), picture(shifted(0)), 1.0)
    assert other.size == (192, 256) and math.isfinite(other.length)
    for width in (22, 23):  # of 256 x 16: DIS's smallest
        wide = Motion().pair(picture(shifted(0)[:, :width]), picture(shifted(0)[:, :width]), 1.0)
        assert wide.size == (256, 16) and wide.length == 0


def test_a_clip_moves_by_the_mean_of_its_pairs():
    """2 pixels and 1 pixel in 0.1 s at a diagonal of 500: 4 and 2 % a second. Content that rises is a tilt down."""
    n = len(range(4, 300, 8)) * len(range(4, 400, 8))
    pairs = [sample((300, 400), np.zeros(n), np.full(n, -2.0)), sample((300, 400), np.zeros(n), np.full(n, -1.0), 0.1)]
    assert Motion().summarise(pairs) == {"motion": pytest.approx(3.0), "camera_motion": "tilt down"}
    assert Motion().summarise([]) == {"motion": None, "camera_motion": None}


def grid(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of the vectors, from the centre: every eighth pixel from the fifth on, row after row."""
    places = [(x - (width - 1) / 2, y - (height - 1) / 2) for y in range(4, height, 8) for x in range(4, width, 8)]
    x, y = np.array(places).T
    return x, y


def similarity(size: tuple[int, int], dx: float, dy: float, zoom: float, roll: float, seconds=0.1) -> FlowSample:
    x, y = grid(*size)
    return sample(size, dx + zoom * x - roll * y, dy + zoom * y + roll * x, seconds)


def test_camera_moves_are_those_that_the_flow_was_made_of():
    """Two sizes; per second, and translations in percent of the diagonal (240 and 100 pixels)."""
    sizes, truth = [(144, 192), (144, 192), (60, 80)], [(3, -2, 0.01, 0.02), (0, 1, -0.03, 0), (-1, 0, 0, -0.01)]
    moves = camera_moves([similarity(size, *t, 0.5) for size, t in zip(sizes, truth)])
    for move, (dx, dy, zoom, roll), diagonal in zip(moves, truth, (240, 240, 100)):
        assert move.right == pytest.approx(dx / diagonal * 200, abs=1e-4)
        assert move.down == pytest.approx(dy / diagonal * 200, abs=1e-4)
        assert move.zoom == pytest.approx(zoom * 200, abs=1e-4) and move.roll == pytest.approx(roll * 2, abs=1e-6)
        assert move.explained == pytest.approx(1, abs=1e-6)
    assert moves[2].length == pytest.approx(similarity(sizes[2], *truth[2]).length * 2)
    (still,) = camera_moves([similarity((144, 192), 0, 0, 0, 0)])
    assert (still.length, still.right, still.zoom, still.roll, still.explained) == (0, 0, 0, 0, 0)


def test_moving_objects_weigh_little():
    """Against weighted least squares by another solver: three rounds, in which the weight of a vector falls with the
    square of what it is off by, to a half at twice the median."""
    size, rng = (144, 192), np.random.default_rng(0)
    x, y = grid(*size)
    u, v = 2 + 0.01 * x + rng.normal(0, 0.3, x.size), -1 + 0.01 * y + rng.normal(0, 0.3, x.size)
    u[: x.size // 10] -= 9  # an object at the top
    design = np.zeros((2, x.size, 4))
    design[0, :, 0] = design[1, :, 1] = 1
    design[0, :, 2], design[0, :, 3], design[1, :, 2], design[1, :, 3] = x, -y, y, x
    target, weights = np.stack([u, v]), np.ones(x.size)
    for _ in range(3):
        root = np.sqrt(weights)[None, :]
        fit = np.linalg.lstsq((design * root[..., None]).reshape(-1, 4), (target * root).ravel(), rcond=None)[0]
        off = ((target - design @ fit) ** 2).sum(0)
        weights = 1 / (1 + off / (4 * np.median(off)))
    left = 1 - ((target - design @ fit) ** 2).sum() / (target**2).sum()
    (move,) = camera_moves([sample(size, u, v, 1.0)])
    scale = 100 / 240
    assert (move.right, move.down) == (pytest.approx(fit[0] * scale, rel=1e-4), pytest.approx(fit[1] * scale, rel=1e-4))
    assert (move.zoom, move.roll) == (pytest.approx(fit[2] * 100, rel=1e-4), pytest.approx(fit[3], rel=1e-3))
    assert move.explained == pytest.approx(max(left, 0), abs=1e-4)
    assert abs(fit[0] - 2) < 0.3, "plain least squares is off by 0.9"


def test_nothing_is_explained_where_every_vector_goes_its_own_way():
    x, _ = grid(144, 192)
    turns = np.arange(x.size) % 2 * 2 - 1
    (move,) = camera_moves([sample((144, 192), 5.0 * turns, 5.0 * turns[::-1])])
    assert move.explained == pytest.approx(0, abs=0.01)


def label(right=0.0, down=0.0, zoom=0.0, roll=0.0, explained=1.0) -> str:
    return camera_label([CameraMove(1.0, right, down, zoom, roll, explained)])


@pytest.mark.parametrize(
    "move, expected",
    [
        # The content moves against the camera.
        ({"right": -5}, "pan right"),
        ({"right": 5}, "pan left"),
        ({"down": -5}, "tilt down"),
        ({"down": 5}, "tilt up"),
        ({"zoom": 5}, "zoom in"),
        ({"zoom": -5}, "zoom out"),
        ({"roll": 0.2}, "roll"),
        ({"roll": -0.2}, "roll"),
        # A percent a second at the edge, half a diagonal from the centre.
        ({"right": 0.99}, "static"),
        ({"right": 1.0}, "pan left"),
        ({"zoom": 1.99}, "static"),
        ({"zoom": 2.0}, "zoom in"),
        ({"roll": 0.0199}, "static"),
        ({"roll": 0.02}, "roll"),
        ({}, "static"),
        # One kind is twice as strong as any other.
        ({"right": 4, "down": 2}, "pan left"),
        ({"right": 4, "down": 2.01}, "complex"),
        ({"right": 4, "zoom": 4}, "pan left"),
        ({"right": 4, "zoom": -4.1}, "complex"),
        ({"down": -4, "roll": 0.04}, "tilt down"),
        ({"down": -4, "roll": 0.041}, "complex"),
        # Half the flow is explained; what is not may move twice as much and still be static.
        ({"right": 5, "explained": 0.5}, "pan left"),
        ({"right": 5, "explained": 0.49}, "complex"),
        ({"right": 1.99, "explained": 0.49}, "static"),
        ({"right": 2.0, "explained": 0.49}, "complex"),
        ({"right": 1.5, "explained": 0.7}, "pan left"),
    ],
)
def test_moves_have_names(move, expected):
    assert label(**move) == expected


def test_a_clip_has_the_name_that_three_fifths_of_its_pairs_have():
    pan, tilt = CameraMove(1, -5, 0, 0, 0, 1), CameraMove(1, 0, 5, 0, 0, 1)
    still = CameraMove(0, 0, 0, 0, 0, 0)
    assert camera_label([pan] * 3 + [tilt] * 2) == "pan right"
    assert camera_label([pan] * 5 + [tilt] * 4) == "complex"
    assert camera_label([still] * 7 + [tilt] * 3) == "static"
    assert camera_label([pan, tilt]) == "complex"


def vmaf(difference: np.ndarray, seconds: float = 1 / 24) -> float:
    """Between a flat picture and one that differs from it by this."""
    flat = np.full((360, 640), 100, np.int16)
    return MotionVmaf().pair(picture(flat.astype(np.uint8)), picture((flat + difference).astype(np.uint8)), seconds)


def test_motion_vmaf_is_the_mean_difference_in_a_24th_of_a_second():
    """The filter's coefficients sum to 65536: what is flat stays as it is."""
    flat = np.full((360, 640), 3)
    assert vmaf(flat) == pytest.approx(3, rel=5e-6) and vmaf(-flat) == pytest.approx(3, rel=5e-6)
    assert vmaf(flat, 1 / 12) == pytest.approx(1.5, rel=5e-6)
    assert vmaf(0 * flat) == 0


def test_motion_vmaf_is_filtered_by_libvmafs_five_taps():
    """Stripes of one line and of two: 26386 - 2 · 16004 + 2 · 3571 and 26386 - 2 · 3571 of 65536 are left."""
    y, x = np.mgrid[:360, :640]
    for place in (x, y):
        assert vmaf(np.where(place % 2, 60, -60)) == pytest.approx(60 * 1520 / 65536, rel=1e-3)
        assert vmaf(np.where(place % 4 < 2, 60, -60)) == pytest.approx(60 * 19244 / 65536, rel=0.02)


def test_motion_vmaf_of_a_clip():
    assert MotionVmaf().summarise([1.0, math.nan, 2.0]) == {"motion_vmaf": 1.5}
    assert MotionVmaf().summarise([math.nan]) == MotionVmaf().summarise([]) == {"motion_vmaf": None}
    narrow, wide = picture(np.zeros((360, 480), np.uint8)), picture(np.zeros((360, 640), np.uint8))
    assert math.isnan(MotionVmaf().pair(narrow, wide, 1.0)), "pictures of two shapes have no difference"
