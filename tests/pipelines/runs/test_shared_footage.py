"""A wider set of real footage, where it lies beside the checkout (see `conftest.collect_ignore`)."""

import json

import av
import pytest

from catalogs.maintenance.validate import problems
from catalogs.tables.catalog import Catalog
from datakit.video.reader import VideoReader
from pipelines.runs.ingest import ingest
from pipelines.runs.score import score
from pipelines.settings import Settings
from pipelines.shots.options import DetectorOptions
from pipelines.stages.ocr import Ocr
from support.compare_catalogs import assert_same_scores
from support.cut_lists import assert_agrees, cli_cuts, cuts_of
from support.long_footage import SHARED_VIDEOS
from support.ocr_savings import savings
from support.one_clip import measure

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shared_videos():
    return SHARED_VIDEOS


@pytest.fixture(scope="module")
def ocr():
    return Ocr()


def test_agrees_with_scenedetect_on_a_long_screencast(shared_videos, tmp_path):
    assert_agrees(shared_videos / "long_1080p.mp4", "adaptive", tmp_path)


@pytest.mark.parametrize("detector", ["adaptive", "content", "threshold"])
@pytest.mark.parametrize(
    "name",
    [
        "testvideo.mp4",
        "chaplin_borders.mp4",
        "pancake.mkv",
        "no_duration.webm",
        "hevc_10bit.mp4",
        "av1.mkv",
        "rotated90.mov",
    ],
)
def test_agrees_with_scenedetect_on_shared_footage(shared_videos, tmp_path, name, detector):
    assert_agrees(shared_videos / name, detector, tmp_path)


def test_agrees_with_scenedetect_on_one_of_several_streams(shared_videos, tmp_path):
    """PySceneDetect reads the first stream; given the best one alone, it finds what we find."""
    with av.open(str(shared_videos / "nasa.mp4")) as source, av.open(str(tmp_path / "one.mp4"), "w") as output:
        stream = output.add_stream_from_template(source.streams[3])
        for packet in source.demux(source.streams[3]):
            if packet.dts is not None:
                packet.stream = stream
                output.mux(packet)
    found = cuts_of(shared_videos / "nasa.mp4", DetectorOptions())
    assert found == cli_cuts(tmp_path / "one.mp4", "adaptive", tmp_path) and found


def test_published_truth(shared_videos):
    truth = json.loads((shared_videos / "truth.json").read_text())
    settings = {
        "content_default": DetectorOptions("content"),
        "content_threshold_30": DetectorOptions("content", threshold=30),
        "adaptive_default": DetectorOptions(),
        "adaptive_threshold_5": DetectorOptions("adaptive", threshold=5),
        "threshold_default": DetectorOptions("threshold"),
    }
    checked = 0
    for name, facts in truth.items():
        if "cuts" in facts:
            assert cuts_of(shared_videos / name, DetectorOptions()) == facts["cuts"], name
            checked += 1
        for key, expected in facts.get("pyscenedetect_0.7", {}).items():
            assert cuts_of(shared_videos / name, settings[key]) == expected, (name, key)
            checked += 1
    assert checked >= 8


def test_known_borders_of_real_footage(shared_videos):
    c = measure(shared_videos / "chaplin_borders.mp4", ["letterbox"]).columns
    assert (c["crop_x"], c["crop_y"], c["crop_width"], c["crop_height"]) == (72, 0, 496, 360)


def test_a_lone_figure_is_no_giant_letter(ocr, shared_videos):
    with VideoReader(str(shared_videos / "av1.mkv")) as reader:  # a test card that the detector takes for one letter
        images = [picture.rgb(640) for picture in reader.frames() if picture.index in (60, 90, 120)]
    (result,) = ocr.run([{"width": 640, "height": 360, "crop_width": None}], [images])
    assert result == {"ocr_area": 0.0, "ocr_boxes": 0}


def test_savings_leave_the_area_alone(ocr, shared_videos):
    names = ("testvideo.mp4", "chaplin_borders.mp4", "nasa.mp4", "pancake.mkv")
    skipped, compared = savings(ocr, [shared_videos / name for name in names])
    assert skipped > 0 and compared > 30


def test_all_of_it_becomes_a_catalog_whose_scores_can_be_reproduced(shared_videos, tmp_path, ray_address):
    report = ingest([str(shared_videos)], str(tmp_path / "c"), Settings(), ray_address)
    assert report.funnel.quarantine == {"empty": 1} and report.funnel.videos_ok == 11 and report.funnel.kept >= 8
    catalog = Catalog(str(tmp_path / "c"))
    assert not list(problems(catalog))
    before = catalog.finished_clips().sort("clip_id").collect()
    assert score(catalog.root, Settings(), redo=True, ray=ray_address)["clips_with_errors"] == 0
    assert assert_same_scores(before, catalog.finished_clips().sort("clip_id").collect()) > 400
