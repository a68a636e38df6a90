"""Clips and a table made by hand: the bucket of each, or the reason."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import polars as pl
import pytest

from trainer.planning.bucket_assignment import Assignment, assign, first_frames
from trainer.planning.buckets import Length, Level, Table
from trainer.planning.settings import PlanSettings

SIZES = ((192, 336), (256, 256), (336, 192))
SMALL = Level(
    "256px", 256**2, SIZES, (Length(33, 1, 1, (0, 1, 2)), Length(17, 1, 1, (3, 4, 5)), Length(1, 1, 1, (6, 7, 8)))
)
LARGE = Level("768px", 768**2, ((576, 1024),), (Length(33, 1, 1, (9,)),))
SCHEMA = {
    "clip_id": pl.String, "kind": pl.String, "fps": pl.Float64, "vfr": pl.Boolean, "num_frames": pl.Int64,
    "width": pl.Int64, "height": pl.Int64, "crop_width": pl.Int64, "crop_height": pl.Int64, "caption": pl.String,
    "split": pl.String, "status": pl.String,
}  # fmt: skip


def clips(*rows: dict[str, Any]) -> pl.DataFrame:
    """48 frames at 24 frames/s, 640 x 360, with a caption, unless a row says otherwise."""
    usual = {
        "kind": "video",
        "fps": 24.0,
        "num_frames": 48,
        "width": 640,
        "height": 360,
        "caption": "a",
        "split": "train",
    }
    return pl.DataFrame([{**usual, "clip_id": f"{i:032x}", **row} for i, row in enumerate(rows)], SCHEMA)


def picture(**columns: Any) -> dict[str, Any]:
    return {"kind": "image", "fps": None, "num_frames": 1, **columns}


def placed(*rows: dict[str, Any], levels: tuple[Level, ...] = (SMALL,), **settings: Any) -> Assignment:
    return assign(clips(*rows), Table(levels, (), 9000, ()), PlanSettings(**settings))


def reason(row: dict[str, Any], **options: Any) -> str | None:
    found = placed(row, **options)
    (text,) = found.reasons
    if text is not None:
        left_out = (found.bucket[0], found.windows[0], found.needed[0], found.crop[0])
        assert left_out == (-1, 0, 0, 0.0)
    assert text is not None or (found.bucket[0] >= 0 and found.windows[0] > 0)
    return text


def test_a_clip_takes_the_longest_window_that_it_fills():
    found = placed({}, {"num_frames": 33}, {"num_frames": 32}, {"num_frames": 17}, picture())
    assert found.bucket.tolist() == [0, 0, 3, 3, 6] and found.bucket.dtype == np.int32
    assert found.needed.tolist() == [33, 33, 17, 17, 1]
    assert found.stride.tolist() == [1] * 5 and found.fps.tolist() == [24.0] * 4 + [0.0]
    assert found.windows.tolist() == [1, 1, 1, 1, 1]


def test_a_clip_takes_the_shape_that_cuts_off_least():
    """640 x 360 becomes 341.3 x 192, of which 336 are taken: 1.5625 % go. A square loses nothing, crops count."""
    shapes = [{}, {"width": 360, "height": 640}, {"width": 500, "height": 500}, {"crop_width": 400, "crop_height": 360}]
    found = placed(*shapes, {"crop_width": 202}, {"width": 700, "height": 480})
    assert found.bucket.tolist() == [0, 2, 1, 1, 2, 0]
    assert found.crop.tolist() == pytest.approx(
        [1 / 64, 1 / 64, 0, 0.1, 1 - (202 / 360) / (192 / 336), 1 - (700 / 480) / 1.75]
    )


def test_windows_fit_without_overlap_up_to_the_most_that_is_allowed():
    lengths = [{"num_frames": n} for n in (33, 65, 66, 98, 99, 132, 400)]
    assert placed(*lengths).windows.tolist() == [1, 1, 2, 2, 3, 4, 4]
    assert placed(*lengths, windows=2).windows.tolist() == [1, 1, 2, 2, 2, 2, 2]
    assert placed({"num_frames": 400, "vfr": True}, {"num_frames": 400, "vfr": False}).windows.tolist() == [1, 4]


def test_strides_and_rates_are_those_of_the_frame_rate_rule():
    """60 frames/s by every second frame: 33 of them span 65."""
    found = placed({"fps": 60.0, "num_frames": 65}, {"fps": 60.0, "num_frames": 64}, {"fps": 30.0, "num_frames": 33})
    assert (found.bucket.tolist(), found.needed.tolist()) == ([0, 3, 0], [65, 33, 33])
    assert (found.stride.tolist(), found.fps.tolist()) == ([2, 2, 1], [30.0, 30.0, 30.0])
    variable = placed({"fps": 30.0, "num_frames": 40, "vfr": True}, {"fps": 30.0, "num_frames": 41, "vfr": True})
    assert variable.needed.tolist() == [21, 41] and variable.stride.tolist() == [0, 0]  # 32 steps of 1.25 frames
    assert placed({"fps": 30.0}, fps=30.0).fps.tolist() == [30.0] and placed(
        {"fps": 30.0}, fps=15.0
    ).stride.tolist() == [2]
    assert placed({"fps": 60.0, "num_frames": 99}, time_error=0.5).stride.tolist() == [0]


def test_a_clip_goes_to_the_largest_resolution_that_it_reaches():
    """Enlarged by 1.1 at most, a side: 1024 / 1.1 = 930.9 pixels across, 576 / 1.1 = 523.6 down."""
    sizes = [
        {"width": 931, "height": 524},
        {"width": 930, "height": 524},
        {"width": 1920, "height": 1080, "num_frames": 20},
    ]
    found = placed(*sizes, levels=(LARGE, SMALL))
    assert found.bucket.tolist() == [9, 0, 3], "what is too short for the large one goes down"
    assert placed({"width": 512, "height": 288}, levels=(LARGE, SMALL), max_upscale=2.0).bucket.tolist() == [9]


def test_limits_that_are_met_exactly_are_met():
    """4:3 in 16:9 loses exactly a quarter; 400 to 440 is 1.1 times exactly."""
    level = Level("x", 1, ((576, 1024),), (Length(33, 1, 1, (0,)),))
    assert placed({"width": 1440, "height": 1080}, levels=(level,)).bucket.tolist() == [0]
    assert placed({"width": 40, "height": 30}, levels=(level,), max_upscale=26).bucket.tolist() == [0], "rounding aside"
    for side in (300, 350, 400, 410):
        exact = Level("x", 1, ((side * 11 // 10, side * 11 // 10),), (Length(33, 1, 1, (0,)),))
        assert placed({"width": side, "height": side}, levels=(exact,)).bucket.tolist() == [0], side


def test_of_sizes_that_cut_off_the_same_the_first_is_taken():
    level = Level("x", 1, ((200, 200), (100, 100), (300, 300)), (Length(33, 1, 1, (0, 1, 2)),))
    assert placed({"width": 700, "height": 700}, levels=(level,)).bucket.tolist() == [0]


def test_a_bucket_over_the_budget_is_passed_over():
    level = Level("x", 1, ((192, 336),), (Length(33, 1, 1, (-1,)), Length(17, 1, 1, (0,))))
    assert placed({}, levels=(level,)).bucket.tolist() == [0] and placed({}, levels=(level,)).needed.tolist() == [17]


def test_pictures_of_videos_only_if_asked():
    rows = [{"num_frames": 5}, {"num_frames": 33}, {"num_frames": 3, "vfr": True}]
    assert placed(*rows).bucket.tolist() == [-1, 0, -1]
    found = placed(*rows, images_from_video=True)
    assert (found.bucket.tolist(), found.windows.tolist()) == ([6, 0, 6], [4, 1, 3])
    assert (found.stride.tolist(), found.fps.tolist()) == ([1, 1, 1], [0.0, 24.0, 0.0])


@pytest.mark.parametrize(
    "row, why",
    [
        ({"status": "quarantined", "split": "val"}, "quarantined: processing failed on it"),
        ({"split": "val", "caption": None}, "split: it belongs to val"),
        ({"caption": None, "width": None}, "no caption: "),
        ({"caption": " \n"}, "no caption: "),
        ({"width": None, "fps": None}, "unknown size: "),
        ({"height": 0}, "unknown size: "),
        ({"crop_width": 0}, "unknown size: "),
        ({"fps": None}, "unknown frame rate: "),
        ({"fps": 0.0}, "unknown frame rate: "),
        ({"num_frames": None}, "unknown frame rate: "),
        ({"num_frames": 0}, "unknown frame rate: "),
    ],
)
def test_what_bars_a_clip_whatever_its_shape(row, why):
    """The first reason that holds, in this order."""
    assert (reason(row) or "").startswith(why)


def test_what_bars_nothing():
    """Unknown splits train, a box may say the size, pictures need no rate, captions may be done without."""
    rows = [
        {"split": None},
        {"width": None, "height": None, "crop_width": 640, "crop_height": 360},
        {"status": "rejected"},
    ]
    assert [reason(row) for row in (*rows, picture(), {"width": 640, "crop_width": None})] == [None] * 5
    assert reason({"caption": None}, captions="optional") is None
    assert reason({"split": "val"}, split="val") is None and reason({}, split="val") == "split: it belongs to train"


def level(*lengths: Length, name: str = "x") -> Level:
    return Level(name, 1, SIZES, lengths)


def test_the_wrong_shape():
    """Of 4:1, 1 - 1.75 / 4 is lost in 336 x 192; 1 - 1.778 / 4 in 1024 x 576. The least of all levels is told."""
    wide = {"width": 800, "height": 200}
    text = "aspect: 800x200 would lose {} % of its picture in the nearest shape, at most {} % may go"
    assert reason(wide) == text.format(56.2, 25)
    for levels in ((SMALL, LARGE), (LARGE, SMALL)):
        assert reason(wide, max_crop=0.5, levels=levels) == text.format(55.6, 50)


def test_too_small():
    """336 / 180 = 1.867 and 192 / 101 = 1.901. The least of all levels is told, but not of shapes that do not fit."""
    small = {"width": 180, "height": 101}
    text = "too small: 180x101 would be enlarged 1.9 times for the smallest bucket, at most {} times is allowed"
    assert reason(small) == text.format(1.1)
    square = Level("y", 1, ((50, 50),), (Length(33, 1, 1, (0,)),))
    assert reason(small, max_upscale=1.5, levels=(LARGE, SMALL, square)) == text.format(1.5)


def test_too_short():
    """For the shortest window that it could have had."""
    text = "too short: {} frames at {} frames/s need {} s ({} source frames), it has {} s ({})"
    assert reason({"num_frames": 16}) == text.format(17, 24.0, 0.71, 17, 0.67, 16)
    assert reason({"num_frames": 32, "fps": 59.94}) == text.format(17, 29.97, 0.55, 33, 0.53, 32)
    only = (level(Length(33, 1, 1, (0, 1, 2))),)
    assert reason({"num_frames": 10}, levels=only) == text.format(33, 24.0, 1.38, 33, 0.42, 10)
    assert reason({"num_frames": 1}, levels=(*only, SMALL)) == text.format(17, 24.0, 0.71, 17, 0.04, 1)


def test_no_bucket_for_a_kind():
    long, too_long, single = Length(33, 1, 1, (0, 1, 2)), Length(33, 1, 1, (-1, -1, -1)), Length(1, 1, 1, (0, 1, 2))
    assert reason(picture(), levels=(level(long),)) == "no bucket for images: none of its size has one frame"
    assert reason({}, levels=(level(too_long, single),)) == (
        "no bucket for videos: none of its size has more than one frame and fits the budget of 9000 tokens"
    )


def test_what_is_nearly_nothing_is_known():
    """One pixel across, and a frame in two seconds."""
    assert (reason({"width": 1}) or "").startswith("aspect: 1x360")
    assert reason({"fps": 0.5}) is None and reason({"num_frames": 1, "fps": 0.5}) is not None


def test_left_out_images_have_a_frame_and_no_rate():
    found = placed(picture(width=20), {"width": 20})
    assert (found.bucket.tolist(), found.stride.tolist(), found.fps.tolist()) == ([-1, -1], [1, 1], [0.0, 24.0])


def test_numbers_in_reasons_have_two_decimals():
    """336 / 180 = 1.8667 and 192 / 103 = 1.8641; 23.976 frames/s."""
    assert "would be enlarged 1.87 times" in (reason({"width": 180, "height": 103}) or "")
    assert "17 frames at 23.98 frames/s" in (reason({"num_frames": 3, "fps": 23.976}) or "")


def test_drawn_for_no_bucket():
    for never in (Length(33, 0, 1, (0, 1, 2)), Length(33, 1, 0, (0, 1, 2))):
        assert reason({}, levels=(level(never),)) == "keep probability: drawn for no bucket"


def uniform(key: str) -> float:
    return int(hashlib.blake2b(key.encode(), digest_size=8).hexdigest(), 16) / 16**16


def test_keep_probabilities_are_drawn_from_the_clips_id():
    """A clip takes the longer length with probability 0.5 and stays at the resolution with 0.7; else it takes 17 frames
    and stays with 0.4. What does not stay goes down."""
    upper = Level("768px", 1, ((192, 336),), (Length(33, 0.7, 0.5, (0,)), Length(17, 0.4, 1.0, (1,))))
    lower = Level("256px", 1, ((192, 336),), (Length(17, 1.0, 1.0, (2,)),))
    rows: list[dict[str, Any]] = [{} for _ in range(400)]
    found = placed(*rows, levels=(upper, lower), seed=5)
    for clip_id, bucket in zip(clips(*rows)["clip_id"], found.bucket.tolist()):
        longer, stays = uniform(f"5/768pxx33/{clip_id}") < 0.5, uniform(f"5/768px/{clip_id}")
        expected = (0 if stays < 0.7 else 2) if longer else (1 if stays < 0.4 else 2)
        assert bucket == expected, clip_id
    assert np.bincount(found.bucket) == pytest.approx([140, 80, 180], abs=40)


def test_windows_are_spread_evenly_and_a_single_one_lies_in_the_middle():
    clip, first = first_frames(
        windows=np.array([3, 1, 1, 4, 2]), needed=np.array([10, 4, 4, 5, 8]), frames=np.array([41, 9, 9, 20, 16]),
        by_time=np.array([False, False, True, False, False]),
    )  # fmt: skip
    assert clip.tolist() == [0, 0, 0, 1, 2, 3, 3, 3, 3, 4, 4]
    assert first.tolist() == [0, 15, 31, 2, 0, 0, 5, 10, 15, 0, 8]
