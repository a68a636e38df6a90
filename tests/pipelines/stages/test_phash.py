"""Hashes of drawn pictures: the same for copies, others for others."""

import cv2
import numpy as np
import pytest

from pipelines.stages.phash import LEAST_CONTRAST, PHash, picture_hash
from pipelines.video_tasks.grid import GridSummary
from support.drawn_videos import encode, moving, texture
from support.one_clip import measure

STAGES = ("letterbox", "phash")


def hashes(columns: dict) -> np.ndarray:
    """Bits of the frame hashes: [n, 64]."""
    return np.unpackbits(np.frombuffer(columns["phash"], np.uint8)).reshape(-1, 64)


def distance(a: dict, b: dict) -> float:
    """Mean over frames."""
    return float((hashes(a) != hashes(b)).sum(axis=1).mean())


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    return moving(360, 640, 24, 2.2, lambda t: [[1, 0, 0.1 * t], [0, 1, 0.02 * t]])


def make(path, frames, **options):
    return measure(
        encode(path, frames, 24, pix_fmt="yuv420p", options={"crf": "20", "preset": "ultrafast"}, **options), STAGES
    ).columns


def test_copies_hash_alike_and_other_pictures_do_not(frames, tmp_path):
    original = make(tmp_path / "a.mp4", frames)
    grey = [np.repeat(cv2.cvtColor(f, cv2.COLOR_RGB2GRAY)[..., None], 3, 2) for f in frames]
    barred = [cv2.copyMakeBorder(f, 60, 60, 0, 0, cv2.BORDER_CONSTANT) for f in frames]
    logo = [f.copy() for f in frames]
    for f in logo:
        f[20:60, 530:620] = 255
    copies = {
        "small": [cv2.resize(f, (320, 180), interpolation=cv2.INTER_AREA) for f in frames],
        "grey": grey,
        "barred": barred,
        "logo": logo,
        "cropped": [cv2.resize(f[9:-9, 16:-16], (640, 360)) for f in frames],
        "dim": [f // 3 for f in frames],
    }
    for name, copy in copies.items():
        assert distance(original, make(tmp_path / f"{name}.mp4", copy)) < 5, name
    other = moving(360, 640, 24, 2.2, lambda t: [[1, 0, 0.1 * t], [0, 1, 0.02 * t]], seed=5)
    assert distance(original, make(tmp_path / "other.mp4", other)) > 20
    assert len(hashes(original)) == 5  # a frame every half second


def test_a_turned_video_hashes_as_it_is_displayed(frames, tmp_path):
    turned = make(tmp_path / "turned.mp4", [np.rot90(f, -1).copy() for f in frames], rotation=90)
    assert distance(make(tmp_path / "upright.mp4", frames), turned) < 2


def test_the_crop_box_comes_from_the_catalog_when_it_is_not_measured(frames, tmp_path):
    barred = [cv2.copyMakeBorder(f, 60, 60, 0, 0, cv2.BORDER_CONSTANT) for f in frames]
    whole = make(tmp_path / "bars.mp4", barred)
    box = {name: whole[name] for name in ("crop_x", "crop_y", "crop_width", "crop_height")}
    summary, span = samples(tmp_path / "bars.mp4")
    assert summary.measure(span, box).columns["phash"] == whole["phash"] != summary.measure(span).columns["phash"]


def samples(path):
    """What `run score --stages phash` has of a video."""
    from datakit.identity import Span
    from datakit.video.reader import VideoReader
    from pipelines.video_tasks.grid import GridProbe

    with VideoReader(str(path)) as reader:
        pictures = list(reader.frames())
        probe, summary = (
            GridProbe({"phash": PHash}, pictures[0].pts, reader.time_base, False),
            GridSummary({"phash": PHash}),
        )
        for picture in pictures:
            for sample in probe.push(picture):
                summary.add(sample)
        return summary, Span(pictures[0].pts, pictures[-1].pts + 1, reader.time_base)


def test_content_hash_is_that_of_the_decoded_pictures(frames, tmp_path):
    one = make(tmp_path / "a.mp4", frames)
    assert make(tmp_path / "a.mkv", frames)["content_hash"] == one["content_hash"] and len(one["content_hash"]) == 16
    changed = [f.copy() for f in frames]
    changed[24][100:140, 100:140] ^= 32
    assert make(tmp_path / "b.mp4", changed)["content_hash"] != one["content_hash"]


def test_what_shows_nothing_leaves_no_hash(frames, tmp_path):
    black = [np.zeros((180, 320, 3), np.uint8)] * 30
    flat = make(tmp_path / "black.mp4", black)
    assert flat["phash"] == b"" and flat["content_hash"] is not None
    small = [cv2.resize(f, (320, 180)) for f in frames[:24]]
    assert len(hashes(make(tmp_path / "fade.mp4", black + small))) == 2  # frames 36 and 48; 0, 12 and 24 are black
    noise = np.random.default_rng(0).normal(100, LEAST_CONTRAST - 1, (54, 96))
    assert picture_hash(noise) == b"" and len(picture_hash(texture(54, 96)[..., 0])) == 8


def test_a_clip_without_a_grid_frame_has_been_looked_at_all_the_same():
    from fractions import Fraction

    from datakit.identity import Span

    columns = GridSummary({"phash": PHash}).measure(Span(0, 5, Fraction(1, 25))).columns
    assert columns == {"phash": b"", "content_hash": None}
