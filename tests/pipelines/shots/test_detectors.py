"""Cut lists equal PySceneDetect's own, and the truth where it is known."""

import json
from importlib.metadata import version
from pathlib import Path

import pytest

from datakit.video.reader import VideoReader
from pipelines.shots.detectors import ContentMeter, make_detector
from pipelines.shots.options import DetectorOptions
from support.cut_lists import DISTRIBUTION, assert_agrees, cuts_of
from support.drawn_videos import encode, shots, texture

pytestmark = pytest.mark.slow

FILM_CUTS = Path(__file__).parents[2] / "data" / "film_cuts.json"


@pytest.mark.parametrize("detector", ["adaptive", "content", "threshold"])
@pytest.mark.parametrize("name", ["bikes.mp4", "bigbuckbunny.mp4"])
def test_agrees_with_scenedetect_on_packaged_footage(footage, tmp_path, name, detector):
    assert_agrees(footage[name], detector, tmp_path)


def test_agrees_with_scenedetect_on_a_whole_film(film):
    """Its list was made once, by tests/data/tools/make_film_cuts.py."""
    theirs = json.loads(FILM_CUTS.read_text())
    assert theirs["version"] == version(DISTRIBUTION), "another PySceneDetect: make its list again"
    assert cuts_of(film, DetectorOptions(theirs["detector"])) == theirs["cuts"]
    assert len(theirs["cuts"]) > 100


def test_known_cuts_of_real_footage(footage):
    assert cuts_of(footage["bikes.mp4"], DetectorOptions()) == [30, 76, 137, 187, 242]
    assert cuts_of(footage["bigbuckbunny.mp4"], DetectorOptions()) == []


@pytest.mark.parametrize("detector", ["adaptive", "content", "transnet"])
@pytest.mark.parametrize("fps", [24, 60])
def test_known_cuts_of_a_drawn_video(tmp_path, detector, fps):
    lengths = [40, 75, 50, 130]
    path = encode(tmp_path / "drawn.mp4", shots(lengths), fps, pix_fmt="yuv420p")
    found = cuts_of(path, DetectorOptions(detector, min_scene_s=0.3))
    assert found == [40, 115, 165]


def test_transnet_finds_the_known_cuts_of_real_footage(footage):
    assert cuts_of(footage["bikes.mp4"], DetectorOptions("transnet")) == [30, 76, 137, 187, 242]


def test_no_cut_is_reported_below_the_settled_frame(footage):
    for name in ("adaptive", "content", "threshold", "transnet"):
        with VideoReader(str(footage["bikes.mp4"])) as reader:
            meter = ContentMeter(thumbnails=True)
            detector = make_detector(DetectorOptions(name), 25.0, reader.time_base)
            settled = 0
            for picture in reader.frames():
                cuts = detector.feed(picture.pts, meter.note(picture))
                assert all(c.frame >= settled for c in cuts)
                assert detector.settled >= settled
                settled = detector.settled
            assert all(c.frame >= settled for c in detector.finish())


def test_threshold_waits_for_fades_only_so_long(tmp_path):
    picture = texture(60, 80)
    frames = [picture] * 30 + [picture * 0] * 2400 + [picture] * 30
    path = encode(tmp_path / "night.mp4", frames, 25, pix_fmt="yuv420p")
    with VideoReader(str(path)) as reader:
        meter, detector = ContentMeter(), make_detector(DetectorOptions("threshold"), 25.0, reader.time_base)
        lag = 0
        for picture in reader.frames():
            detector.feed(picture.pts, meter.note(picture))
            lag = max(lag, picture.index - detector.settled)
    assert lag <= 31 * 25
