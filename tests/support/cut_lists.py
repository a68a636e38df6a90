"""Cut lists of our detectors, and of PySceneDetect's own command line."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

from datakit.video.reader import VideoReader
from pipelines.shots.detectors import ContentMeter, make_detector
from pipelines.shots.options import DetectorOptions

DISTRIBUTION = "scenedetect-headless"
"""Where PySceneDetect comes from."""


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
    command = [
        str(Path(sys.executable).with_name("scenedetect")),
        "-q",
        "-i",
        str(path),
        "-o",
        str(folder),
        f"detect-{detector}",
        *extra,
        "list-scenes",
        "-q",
    ]
    subprocess.run(command, check=True, capture_output=True)
    listed = [row for file in folder.glob("*.csv") for row in csv.reader(file.open())]
    return [int(row[1]) - 1 for row in listed if row and row[0].isdigit()][1:]


def assert_agrees(path, detector: str, folder: Path) -> None:
    # Its command line always reports a fade out that ends the video.
    options = DetectorOptions(detector, final_scene=detector == "threshold")
    assert cuts_of(path, options) == cli_cuts(path, detector, folder)
