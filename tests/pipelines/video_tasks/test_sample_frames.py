"""The frames that a model is shown: at the right times, inside the borders, of the right size."""

from fractions import Fraction

import numpy as np
import pytest

from datakit.identity import Span, video_id
from datakit.video.reader import VideoReader
from pipelines.video_tasks.messages import CaptionJob, ClipSpan, VideoFacts
from pipelines.video_tasks.sample_frames import frame_times, sample
from support.drawn_videos import encode

FPS = 25
BARS = 40


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """Eight seconds of 240 lines between black bars; each picture's brightness says its number."""
    frames = []
    for number in range(8 * FPS):
        picture = np.zeros((240 + 2 * BARS, 480, 3), np.uint8)
        picture[BARS:-BARS] = 40 + number
        frames.append(picture)
    return encode(
        tmp_path_factory.mktemp("film") / "f.mp4",
        frames,
        FPS,
        pix_fmt="yuv420p",
        options={"crf": "2", "preset": "ultrafast"},
    )


def shown(film, start: float, end: float, fps: float, frames: int = 16, side: int = 448, **facts):
    with VideoReader(str(film)) as reader:
        base = reader.time_base
    with open(film, "rb") as file:
        identity = video_id(file, film.stat().st_size)
    span = ClipSpan("c", int(start / base), int(end / base), {"crop_width": None, **facts})
    batch, spent = sample(CaptionJob(identity, str(film), film.stat().st_size, 0, (span,), fps, frames, side))
    assert isinstance(spent, VideoFacts)
    return batch.rows[0], batch.images[0]


def numbers(images) -> list[int]:
    return [round(float(image[image.shape[0] // 2].mean())) - 40 for image in images]


@pytest.mark.parametrize(
    "fps, frames, expected",
    [
        (1, 16, [12, 37, 62, 87]),
        (2, 16, [6, 18, 31, 43, 56, 68, 81, 93]),
        (2, 4, [12, 37, 62, 87]),
        (0.1, 16, [50]),
    ],
)
def test_frames_lie_in_the_middle_of_equal_parts(film, fps, frames, expected):
    row, images = shown(film, 1.0, 5.0, fps, frames)
    assert np.abs(np.subtract(numbers(images), np.add(expected, FPS))).max() <= 1
    assert row["duration_s"] == pytest.approx(4.0) and row["times"] == pytest.approx(np.array(expected) / FPS, abs=0.05)
    assert not row["errors"]


def test_frames_show_what_is_inside_the_borders_at_the_size_wanted(film):
    _, whole = shown(film, 0, 4, 1)
    assert whole[0].shape == (299, 448, 3) and whole[0][0].max() < 24
    box = {"crop_x": 0, "crop_y": BARS, "crop_width": 480, "crop_height": 240}
    _, inside = shown(film, 0, 4, 1, side=240, **box)
    assert inside[0].shape == (120, 240, 3) and inside[0].min() > 40
    assert numbers(inside) == pytest.approx(numbers(whole), abs=1)
    assert shown(film, 0, 4, 1, side=2000, **box)[1][0].shape == (240, 480, 3), "never enlarged"


def test_a_clip_of_one_frame_is_shown_and_an_empty_stretch_is_an_error(film):
    row, images = shown(film, 2.0, 2.0 + 1 / FPS, 2)
    assert numbers(images) == [50] and row["times"] == [0.0]
    row, images = shown(film, 50.0, 52.0, 2)
    assert not images and row["errors"][0]["kind"] == "decode"


def test_times_are_those_of_a_slow_clip_too():
    span = Span(1000, 1010, Fraction(1, 5))  # ten frames in two seconds
    assert frame_times(span, 2.0, 16) == [1001, 1003, 1006, 1008]
    assert frame_times(Span(0, 1, Fraction(1, 25)), 2.0, 16) == [0]
