"""Cut lists equal PySceneDetect's own, and the truth where it is known."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from makevideo import encode, shots, texture

from datakit.video.decode import VideoReader
from pipelines.jobs import DetectorOptions
from pipelines.stages.shots import ContentMeter, make_detector


def cuts_of(path, options: DetectorOptions) -> list[int]:
    with VideoReader(str(path)) as reader:
        meter = ContentMeter(thumbnails=options.name == "transnet")
        detector = make_detector(options, float(reader.stream.average_rate), reader.time_base)
        cuts = []
        for picture in reader.frames():
            cuts += detector.feed(picture.pts, meter.note(picture))
            assert all(c.frame <= picture.index for c in cuts)
        return [c.frame for c in cuts + detector.finish()]


def cli_cuts(path, detector: str, folder: Path) -> list[int]:
    """The first frame of every scene but the first, as PySceneDetect's command line lists them."""
    # Its `detect-threshold` ignores fades shorter than 0.1 s, its classes do not.
    extra = ["--min-out-length", "0s"] if detector == "threshold" else []
    command = [str(Path(sys.executable).with_name("scenedetect")), "-q", "-i", str(path), "-o", str(folder),
               f"detect-{detector}", *extra, "list-scenes", "-q"]
    subprocess.run(command, check=True, capture_output=True)
    listed = [row for file in folder.glob("*.csv") for row in csv.reader(file.open())]
    return [int(row[1]) - 1 for row in listed if row and row[0].isdigit()][1:]


def assert_agrees(path, detector: str, folder: Path) -> None:
    # Its command line always reports a fade out that ends the video.
    options = DetectorOptions(detector, final_scene=detector == "threshold")
    assert cuts_of(path, options) == cli_cuts(path, detector, folder)


@pytest.mark.parametrize("detector", ["adaptive", "content", "threshold"])
@pytest.mark.parametrize("name", ["bikes.mp4", "bigbuckbunny.mp4"])
def test_agrees_with_scenedetect_on_packaged_footage(footage, tmp_path, name, detector):
    assert_agrees(footage[name], detector, tmp_path)


def test_agrees_with_scenedetect_on_a_whole_film(film, tmp_path):
    assert_agrees(film, "adaptive", tmp_path)


def test_agrees_with_scenedetect_on_a_long_screencast(shared_videos, tmp_path):
    assert_agrees(shared_videos / "long_1080p.mp4", "adaptive", tmp_path)


@pytest.mark.parametrize("detector", ["adaptive", "content", "threshold"])
@pytest.mark.parametrize(
    "name", ["testvideo.mp4", "chaplin_borders.mp4", "pancake.mkv", "no_duration.webm", "hevc_10bit.mp4", "av1.mkv",
             "rotated90.mov"],
)
def test_agrees_with_scenedetect_on_shared_footage(shared_videos, tmp_path, name, detector):
    assert_agrees(shared_videos / name, detector, tmp_path)


def test_agrees_with_scenedetect_on_one_of_several_streams(shared_videos, tmp_path):
    """PySceneDetect reads the first stream; given the best one alone, it finds what we find."""
    import av

    with av.open(str(shared_videos / "nasa.mp4")) as source, av.open(str(tmp_path / "one.mp4"), "w") as output:
        stream = output.add_stream_from_template(source.streams[3])
        for packet in source.demux(source.streams[3]):
            if packet.dts is not None:
                packet.stream = stream
                output.mux(packet)
    found = cuts_of(shared_videos / "nasa.mp4", DetectorOptions())
    assert found == cli_cuts(tmp_path / "one.mp4", "adaptive", tmp_path) and found


def test_known_cuts_of_real_footage(footage):
    assert cuts_of(footage["bikes.mp4"], DetectorOptions()) == [30, 76, 137, 187, 242]
    assert cuts_of(footage["bigbuckbunny.mp4"], DetectorOptions()) == []


def test_published_truth(shared_videos):
    truth = json.loads((shared_videos / "truth.json").read_text())
    settings = {
        "content_default": DetectorOptions("content"), "content_threshold_30": DetectorOptions("content", threshold=30),
        "adaptive_default": DetectorOptions(), "adaptive_threshold_5": DetectorOptions("adaptive", threshold=5),
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
