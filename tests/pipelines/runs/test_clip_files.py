"""Clip files hold exactly the frames of their span: the first and last by index and by perceptual hash."""

from fractions import Fraction

import cv2
import numpy as np
import pytest

from datakit.identity import Span
from datakit.video.cut import copy, cut
from datakit.video.reader import VideoReader
from support.drawn_videos import encode, shots, texture

LOSSY = {"crf": "22", "preset": "veryfast", "g": "25", "bf": "3"}
VFR = np.cumsum([0] + [25, 50, 33, 100, 17, 41] * 40)[:160].tolist()
SOURCES = {
    "23.976": dict(fps=Fraction(24000, 1001), time_base=Fraction(1, 24000)),
    "29.97": dict(fps=Fraction(30000, 1001), time_base=Fraction(1, 30000)),
    "60": dict(fps=60, time_base=Fraction(1, 15360)),
    "vfr": dict(fps=25, time_base=Fraction(1, 1000), pts=VFR),
}


def numbered(i: int, picture: np.ndarray) -> np.ndarray:
    frame = picture.copy()
    for bit in range(10):
        frame[:24, bit * 12 : bit * 12 + 12] = 230 if i >> bit & 1 else 20
    return frame


def number_of(rgb: np.ndarray) -> int:
    return sum(1 << bit for bit in range(10) if rgb[12, bit * 12 + 6].mean() > 128)


def phash(rgb: np.ndarray) -> np.ndarray:
    """The 64-bit DCT hash (Zauner 2010): signs of low frequencies against their median."""
    grey = cv2.resize(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(grey)[:8, :8].ravel()
    return low > np.median(low)


@pytest.fixture(params=SOURCES)
def source(request, tmp_path):
    frames = [numbered(i, f) for i, f in enumerate(shots([50, 60, 50], 96, 128))]
    path = encode(tmp_path / "source.mp4", frames, pix_fmt="yuv420p", options=LOSSY, **SOURCES[request.param])
    with VideoReader(str(path)) as reader:
        pictures = [(p.pts, p.rgb()) for p in reader.frames()]
        return str(path), pictures, reader.time_base


def read(path) -> list[np.ndarray]:
    with VideoReader(str(path)) as reader:
        assert not reader.damage
        return [p.rgb() for p in reader.frames()]


@pytest.mark.parametrize("start, end", [(50, 110), (0, 50), (13, 14), (110, 160), (37, 49)])
def test_cut_files_hold_exactly_their_frames(source, tmp_path, start, end):
    path, pictures, time_base = source
    end_pts = pictures[end][0] if end < len(pictures) else pictures[-1][0] + 1
    with VideoReader(path) as reader:
        assert cut(reader, Span(pictures[start][0], end_pts, time_base), tmp_path / "clip.mp4") == end - start
    frames = read(tmp_path / "clip.mp4")
    assert [number_of(f) for f in frames] == list(range(start, end))
    for got, expected in ((frames[0], pictures[start][1]), (frames[-1], pictures[end - 1][1])):
        assert (phash(got) != phash(expected)).sum() <= 2


def test_cut_files_keep_the_timing(source, tmp_path):
    path, pictures, time_base = source
    with VideoReader(path) as reader:
        cut(reader, Span(pictures[20][0], pictures[70][0], time_base), tmp_path / "clip.mp4")
    with VideoReader(str(tmp_path / "clip.mp4")) as reader:
        times = [float(p.pts * reader.time_base) for p in reader.frames()]
    wanted = [float((pts - pictures[20][0]) * time_base) for pts, _ in pictures[20:70]]
    assert np.abs(np.array(times) - times[0] - wanted).max() < 1e-3


@pytest.mark.parametrize("start, end", [(50, 110), (0, 50), (3, 62), (110, 160)])
def test_copies_hold_no_frame_from_outside_and_say_what_they_lost(source, tmp_path, start, end):
    path, pictures, time_base = source
    end_pts = pictures[end][0] if end < len(pictures) else pictures[-1][0] + 1
    with VideoReader(path) as reader:
        copied = copy(reader, Span(pictures[start][0], end_pts, time_base), tmp_path / "clip.mp4")
    numbers = [number_of(f) for f in read(tmp_path / "clip.mp4")]
    assert numbers == list(range(start + copied.lost_start, end - copied.lost_end))
    assert copied.frames == len(numbers) > 0


def test_a_span_that_begins_on_a_key_frame_loses_nothing_at_its_start(tmp_path):
    path = encode(
        tmp_path / "s.mp4",
        [numbered(i, texture(96, 128, i % 3)) for i in range(75)],
        25,
        pix_fmt="yuv420p",
        options={"crf": "22", "g": "25", "bf": "0", "sc_threshold": "0"},
    )
    with VideoReader(str(path)) as reader:
        times = [p.pts for p in reader.frames()]
        base = reader.time_base
    with VideoReader(str(path)) as reader:
        copied = copy(reader, Span(times[25], times[50], base), tmp_path / "c.mp4")
    assert (copied.lost_start, copied.lost_end, copied.frames) == (0, 0, 25)


def test_a_span_without_a_key_frame_cannot_be_copied(tmp_path):
    path = encode(
        tmp_path / "s.mp4",
        [numbered(i, texture(96, 128, 1)) for i in range(60)],
        25,
        pix_fmt="yuv420p",
        options={"crf": "22", "g": "60", "sc_threshold": "0"},
    )
    with VideoReader(str(path)) as reader:
        times = [p.pts for p in reader.frames()]
        base = reader.time_base
    with VideoReader(str(path)) as reader:
        assert copy(reader, Span(times[20], times[40], base), tmp_path / "c.mp4") is None
