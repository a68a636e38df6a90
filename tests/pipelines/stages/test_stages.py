"""Each score has the value that the drawing of the video gives it, at every size and frame rate."""

import math
import re
import subprocess

import cv2
import imageio_ffmpeg
import numpy as np
import pytest

from datakit.video.reader import VideoReader
from pipelines.stages.motion import Motion
from support.drawn_videos import encode, moving, texture
from support.one_clip import measure

LARGE = "1080p60"
"""Takes seconds a video."""
EACH = ["240p24", "720p30", pytest.param(LARGE, marks=pytest.mark.slow)]
FORMATS = {"240p24": (240, 426, 24), "720p30": (720, 1280, 30), LARGE: (1080, 1920, 60)}
DIAGONAL = math.hypot(240, 426) / 240  # in frame heights


def make(tmp_path, name: str, move, seconds=1.2, **options):
    height, width, fps = FORMATS[name]
    return encode(
        tmp_path / f"{name}.mp4", moving(height, width, fps, seconds, move), fps, pix_fmt="yuv420p", **options
    )


def pan(percent_per_s: float, angle: float = 0.0):
    """A window moving by so many percent of the diagonal per second."""
    speed = percent_per_s / 100 * DIAGONAL
    return lambda t: [[1, 0, speed * math.cos(angle) * t], [0, 1, speed * math.sin(angle) * t]]


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("percent", [5.0, 25.0])
def test_motion_is_the_known_translation(tmp_path, name, percent):
    measured = measure(make(tmp_path, name, pan(percent, 0.5)), ["motion"])
    assert measured.columns["motion"] == pytest.approx(percent, rel=0.1)


@pytest.mark.slow
def test_motion_and_motion_vmaf_agree_across_sizes_and_rates(tmp_path):
    scores = [measure(make(tmp_path, name, pan(15.0, 1.0)), ["motion", "motion_vmaf"]).columns for name in FORMATS]
    for column in ("motion", "motion_vmaf"):
        values = [s[column] for s in scores]
        assert max(values) / min(values) < 1.15, (column, values)


def test_farneback_measures_the_same_motion(tmp_path):
    path = make(tmp_path, "240p24", pan(15.0))
    with VideoReader(str(path)) as reader:
        pictures = list(reader.frames())
    for method, tolerance in (("dis", 0.1), ("farneback", 0.2)):  # Farneback smooths over the edges
        sample = Motion(method).pair(pictures[10], pictures[12], 2 / 24)
        assert sample.length * sample.percent_per_second == pytest.approx(15.0, rel=tolerance)


def test_a_still_does_not_move(tmp_path):
    columns = measure(make(tmp_path, "720p30", pan(0.0))).columns
    assert columns["motion"] < 0.2 and columns["motion_vmaf"] < 0.01 and columns["camera_motion"] == "static"


MOVES = {
    "pan right": pan(12, 0.0),
    "pan left": pan(12, math.pi),
    "tilt down": pan(12, math.pi / 2),
    "tilt up": pan(12, -math.pi / 2),
    "zoom in": lambda t: [[0.85**t, 0, 0], [0, 0.85**t, 0]],
    "zoom out": lambda t: [[1.15**t, 0, 0], [0, 1.15**t, 0]],
    "roll": lambda t: [[math.cos(0.2 * t), -math.sin(0.2 * t), 0], [math.sin(0.2 * t), math.cos(0.2 * t), 0]],
    "complex": lambda t: [[0.87**t, 0, 0.15 * t], [0, 0.87**t, 0]],
}


@pytest.mark.parametrize(
    "name, label",
    [
        *(("240p24", label) for label in MOVES),
        ("720p30", "pan right"),
        pytest.param(LARGE, "zoom in", marks=pytest.mark.slow),
    ],
)
def test_camera_moves_are_named(tmp_path, name, label):
    assert measure(make(tmp_path, name, MOVES[label]), ["motion"]).columns["camera_motion"] == label


def test_a_moving_object_is_no_camera_move(tmp_path):
    height, width, fps = FORMATS["240p24"]
    frames = []
    background, ball = texture(height, width, 1), texture(60, 60, 2)
    for i in range(40):
        frame = background.copy()
        frame[90:150, 20 + 5 * i : 80 + 5 * i] = ball
        frames.append(frame)
    columns = measure(encode(tmp_path / "ball.mp4", frames, fps, pix_fmt="yuv420p"), ["motion"]).columns
    assert columns["camera_motion"] == "static" and columns["motion"] > 1


@pytest.mark.parametrize("rotation", [90, 270])
def test_camera_moves_are_those_of_the_displayed_picture(tmp_path, rotation):
    height, width, fps = FORMATS["240p24"]
    upright = moving(height, width, fps, 2.2, pan(12, 0.0))
    stored = [np.rot90(f, -rotation // 90).copy() for f in upright]
    path = encode(tmp_path / "turned.mp4", stored, fps, rotation=rotation, pix_fmt="yuv420p")
    assert measure(path, ["motion"]).columns["camera_motion"] == "pan right"


def test_motion_vmaf_is_ffmpegs_vmafmotion(tmp_path):
    """At 360 lines and 24 fps the definitions coincide."""
    path = encode(tmp_path / "m.mp4", moving(360, 640, 24, 3.0, pan(10.0, 0.7)), 24, pix_fmt="yuv420p")
    log = tmp_path / "motion.txt"
    subprocess.run(
        [
            imageio_ffmpeg.get_ffmpeg_exe(),
            "-v",
            "error",
            "-i",
            str(path),
            "-vf",
            f"vmafmotion=stats_file={log}",
            "-f",
            "null",
            "-",
        ],
        check=True,
    )
    values = [float(v) for v in re.findall(r"motion:([\d.]+)", log.read_text())][1:]
    assert measure(path, ["motion_vmaf"]).columns["motion_vmaf"] == pytest.approx(np.mean(values), rel=0.02)


def with_bars(frames: list[np.ndarray], top: int, bottom: int, left: int, right: int) -> list[np.ndarray]:
    out = []
    for frame in frames:
        frame = frame.copy()
        h, w = frame.shape[:2]
        frame[:top], frame[h - bottom :], frame[:, :left], frame[:, w - right :] = 0, 0, 0, 0
        out.append(frame)
    return out


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize(
    "share", [(0.12, 0.12, 0, 0), (0, 0, 0.15, 0.15), (0.1, 0.2, 0.05, 0.1)], ids=["letterbox", "pillarbox", "both"]
)
def test_bars_give_the_crop_box(tmp_path, name, share):
    height, width, fps = FORMATS[name]
    top, bottom = (round(s * height / 2) * 2 for s in share[:2])
    left, right = (round(s * width / 2) * 2 for s in share[2:])
    frames = with_bars(moving(height, width, fps, 1.2, pan(10)), top, bottom, left, right)
    path = encode(tmp_path / "bars.mp4", frames, fps, pix_fmt="yuv420p", options={"crf": "23", "preset": "ultrafast"})
    c = measure(path, ["letterbox"]).columns
    expected = (left, top, width - left - right, height - top - bottom)
    got = (c["crop_x"], c["crop_y"], c["crop_width"], c["crop_height"])
    assert all(abs(a - b) <= 2 for a, b in zip(got, expected)), (got, expected)


def test_no_bars_give_the_whole_picture(tmp_path):
    c = measure(make(tmp_path, "720p30", pan(10), 1.2), ["letterbox"]).columns
    assert (c["crop_x"], c["crop_y"], c["crop_width"], c["crop_height"]) == (0, 0, 1280, 720)


def night(frame: np.ndarray, i: int) -> np.ndarray:
    """A dark street: a few lights that move, sky and ground black."""
    dark = np.zeros_like(frame)
    h, w = frame.shape[:2]
    for k in range(6):
        cv2.circle(dark, ((k * 97 + i * 4) % w, h // 2 + (k * 37) % (h // 5)), 6, (200, 180, 120), -1)
    return dark


def test_a_dark_scene_has_no_border(tmp_path):
    frames = [night(np.zeros((240, 426, 3), np.uint8), i) for i in range(60)]
    c = measure(encode(tmp_path / "night.mp4", frames, 24, pix_fmt="yuv420p"), ["letterbox"]).columns
    assert (c["crop_x"], c["crop_y"], c["crop_width"], c["crop_height"]) == (0, 0, 426, 240)


def test_bars_that_come_and_go_are_no_border(tmp_path):
    frames = moving(240, 426, 24, 2.0, pan(10))
    frames = with_bars(frames[:24], 30, 30, 0, 0) + frames[24:]
    c = measure(encode(tmp_path / "half.mp4", frames, 24, pix_fmt="yuv420p"), ["letterbox"]).columns
    assert c["crop_height"] == 240


@pytest.mark.parametrize("name", EACH)
def test_brightness_contrast_and_saturation_of_known_colours(tmp_path, name):
    height, width, fps = FORMATS[name]
    frame = np.zeros((height, width, 3), np.uint8)
    frame[:, : width // 2] = 204  # luma 0.8, unsaturated
    frame[:, width // 2 :] = (102, 51, 51)  # HSV saturation 0.5
    c = measure(encode(tmp_path / "flat.mp4", [frame] * fps, fps, pix_fmt="yuv420p"), ["quality"]).columns
    luma = [0.8, 0.2126 * 0.4 + 0.7874 * 0.2]
    assert c["brightness"] == pytest.approx(np.mean(luma), abs=0.01)
    assert c["contrast"] == pytest.approx(np.std(luma), abs=0.01)
    assert c["saturation"] == pytest.approx(0.25, abs=0.02)
    assert c["interlaced"] == 0


@pytest.mark.slow
def test_blur_falls_with_blurring_and_not_with_size(tmp_path):
    values = {}
    for name in ("720p30", "1080p60"):
        height, width, fps = FORMATS[name]
        sharp = texture(height, width, scale=height / 1080)
        for sigma in (0.0, 0.01):
            frame = cv2.GaussianBlur(sharp, (0, 0), sigma * height) if sigma else sharp
            path = encode(tmp_path / "b.mp4", [frame] * 3, fps, pix_fmt="yuv420p")
            values[name, sigma] = measure(path, ["quality"]).columns["blur"]
    assert values["720p30", 0.0] / values["1080p60", 0.0] == pytest.approx(1, abs=0.35)
    for name in ("720p30", "1080p60"):
        assert values[name, 0.01] < 0.2 * values[name, 0.0]


def test_combed_frames_are_noticed(tmp_path):
    fields = moving(480, 640, 50, 1.0, pan(40))
    woven = []
    for a, b in zip(fields[::2], fields[1::2]):
        frame = a.copy()
        frame[1::2] = b[1::2]
        woven.append(frame)
    combed = measure(encode(tmp_path / "i.mp4", woven, 25, pix_fmt="yuv444p"), ["quality"]).columns["interlaced"]
    whole = measure(encode(tmp_path / "p.mp4", fields[::2], 25, pix_fmt="yuv444p"), ["quality"]).columns["interlaced"]
    assert combed == 1.0 and whole == 0.0


def test_pictures_are_those_nearest_to_the_positions(tmp_path):
    frames = [np.full((72, 128, 3), 20 + i, np.uint8) for i in range(200)]
    path = encode(tmp_path / "count.mp4", frames, 25, pix_fmt="yuv420p")
    images = measure(path, ["quality"], (0.1, 0.5, 0.9)).images
    assert [int(round(image.mean())) - 20 for image in images] == pytest.approx([25, 100, 175], abs=2)
    assert images[0].shape == (72, 128, 3)


def test_a_failing_stage_costs_its_columns_only(tmp_path, monkeypatch):
    from pipelines.stages.quality import Quality

    monkeypatch.setattr(Quality, "frame", lambda self, picture: 1 / 0)
    measured = measure(make(tmp_path, "240p24", pan(10), 1.0))
    assert measured.columns["blur"] is None and measured.columns["motion"] > 5
    assert [e["stage"] for e in measured.errors] == ["quality"] and "division by zero" in measured.errors[0]["message"]
