"""Known colours come back within 2/255 on every decode path, whatever the tags, range, depth and size."""

from fractions import Fraction

import numpy as np
import pytest

from datakit.identity import Span
from datakit.video.cut import cut
from datakit.video.reader import VideoReader
from support.drawn_videos import bars, encode

CASES = [
    # height, width, matrix, full range, tagged, pixel format
    (720, 1280, "bt709", False, True, "yuv420p"),
    (720, 1280, "bt709", False, False, "yuv420p"),  # untagged HD is BT.709
    (1080, 1920, "bt709", True, True, "yuv420p"),
    (240, 320, "bt601", False, False, "yuv420p"),  # untagged SD is BT.601
    (240, 320, "bt601", False, True, "yuv420p"),
    (240, 320, "bt709", False, True, "yuv420p"),  # the tag wins over the size
    (240, 320, "bt601", True, True, "yuv444p"),
    (720, 1280, "bt709", False, True, "yuv444p10le"),
    (240, 320, "bt2020", False, True, "yuv444p10le"),
]


def middles(picture: np.ndarray) -> np.ndarray:
    """The colour in the middle of each of eight bars, away from the edges."""
    h, w = picture.shape[:2]
    return np.array([picture[h // 2, round((i + 0.5) * w / 8)] for i in range(8)], int)


@pytest.fixture(params=CASES, ids=lambda c: "-".join(map(str, c)))
def bar_video(request, tmp_path):
    height, width, matrix, full, tagged, pix_fmt = request.param
    picture = bars(height, width)
    path = encode(
        tmp_path / "bars.mp4", [picture] * 12, 24, matrix=matrix, full_range=full, tagged=tagged, pix_fmt=pix_fmt
    )
    return path, middles(picture)


def test_every_decode_path_gives_the_colours(bar_video, tmp_path):
    path, truth = bar_video
    with VideoReader(str(path)) as reader:
        time_base = reader.time_base
        pictures = list(reader.frames())
    paths = {"sequential": pictures[5].rgb(), "scaled": pictures[5].rgb(160)}
    with VideoReader(str(path)) as reader:
        paths["sparse"] = next(reader.at([pictures[7].pts]))[1].rgb()
    with VideoReader(str(path)) as reader:
        paths["span"] = next(reader.span(Span(pictures[3].pts, pictures[6].pts, time_base))).rgb()
    for name, picture in paths.items():
        assert np.abs(middles(picture) - truth).max() <= 2, name


def test_cut_files_keep_the_colours_and_are_tagged(bar_video, tmp_path):
    path, truth = bar_video
    with VideoReader(str(path)) as reader:
        first, *_, last = [p.pts for p in reader.frames()]
        span = Span(first, last, reader.time_base)
    with VideoReader(str(path)) as reader:
        cut(reader, span, tmp_path / "cut.mp4")
    with VideoReader(str(tmp_path / "cut.mp4")) as reader:
        picture = next(reader.frames())
        assert (int(picture.frame.colorspace), int(picture.frame.color_range)) == (1, 1)  # BT.709, limited
        assert np.abs(middles(picture.rgb()) - truth).max() <= 3  # one more step of rounding


def test_luma_is_the_same_at_every_range_and_size(tmp_path):
    levels = []
    for height, width, full in [(240, 320, False), (720, 960, True), (1080, 1440, False)]:
        path = encode(tmp_path / f"{height}.mp4", [bars(height, width)] * 2, 24, full_range=full, pix_fmt="yuv420p")
        with VideoReader(str(path)) as reader:
            luma = next(reader.frames()).luma()
        assert luma.shape == (360, 480)
        levels.append([int(luma[180, round((i + 0.5) * 60)]) for i in range(8)])
    assert np.abs(np.diff(np.array(levels), axis=0)).max() <= 2


def test_rgb_images_are_read_as_they_are(tmp_path):
    import cv2

    picture = bars(120, 160)
    cv2.imwrite(str(tmp_path / "bars.png"), picture[..., ::-1])
    with VideoReader(str(tmp_path / "bars.png")) as reader:
        assert np.array_equal(next(reader.frames()).rgb(), picture)


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotation_is_applied(tmp_path, rotation):
    upright = np.zeros((64, 96, 3), np.uint8)
    upright[:16, :24] = (200, 60, 40)  # a red corner, top left
    stored = np.rot90(upright, -rotation // 90).copy()
    path = encode(tmp_path / "turned.mp4", [stored] * 3, 25, rotation=rotation, pix_fmt="yuv420p")
    with VideoReader(str(path)) as reader:
        picture = next(reader.frames())
    assert (picture.geometry.width, picture.geometry.height) == (96, 64)
    shown = picture.rgb().astype(int)
    assert np.abs(shown[8, 12] - (200, 60, 40)).max() <= 2
    assert shown[40, 60].max() <= 2
    assert Fraction(picture.luma().shape[1], picture.luma().shape[0]) == Fraction(540, 360)
