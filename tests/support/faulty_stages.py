"""Tools and stages with faults planted in them. Workers import this module by name."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from unittest import mock

import numpy as np

from pipelines.stages.ocr import Ocr
from pipelines.video_tasks.messages import ClipBatch, FileJob, PassJob, VideoFacts


def misbehave(how: str) -> None:
    if how == "segv":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif how == "loop":
        while True:
            pass
    elif how == "memory":
        np.ones(10 << 27).sum()  # 10 GiB
    elif how == "raise":
        raise RuntimeError("planted")
    elif how == "exit":
        os._exit(3)


def echo(payload: object) -> Iterator[object]:
    """A tool: misbehaves where the payload asks for it."""
    yield "before"
    misbehave(str(payload))
    yield payload


def faulty_decoder(job: PassJob) -> Iterator[ClipBatch | VideoFacts]:
    """`analyse`, but a video named after a fault has it while its 80th frame is decoded."""
    from datakit.video.reader import VideoReader
    from pipelines.video_tasks.analyse import analyse

    count_attempt(job.uri)
    frames = VideoReader.frames

    def faulty_frames(reader):
        for picture in frames(reader):
            if picture.index == 80:
                misbehave(name_of(job.uri))
            yield picture

    with mock.patch.object(VideoReader, "frames", faulty_frames):
        yield from analyse(job)


STAGE_CODE = {
    "shots": "pipelines.shots.detectors.ContentMeter.note",
    "division": "pipelines.shots.clip_splitter.Divider.push",
    "motion": "pipelines.stages.motion.Motion.pair",
    "motion_vmaf": "pipelines.stages.motion.MotionVmaf.pair",
    "letterbox": "pipelines.stages.letterbox.Letterbox.summarise",
    "quality": "pipelines.stages.quality.Quality.frame",
    "phash": "pipelines.stages.phash.PHash.summarise",
}
"""What raises in a video of that name."""


def faulty_stages(job: PassJob) -> Iterator[ClipBatch | VideoFacts]:
    """`analyse`, but in a video named after a stage that stage raises."""
    from pipelines.video_tasks.analyse import analyse

    place = STAGE_CODE.get(name_of(job.uri))
    if place is None:
        yield from analyse(job)
        return
    with mock.patch(place, side_effect=RuntimeError("planted")):
        yield from analyse(job)


def faulty_files(job: FileJob) -> Iterator[ClipBatch | VideoFacts]:
    """`materialise`, but a video named after a fault has it."""
    from pipelines.video_tasks.cut import materialise

    count_attempt(job.uri)
    for item in materialise(job):
        misbehave(name_of(job.uri))
        yield item


class FaultyStage(Ocr):
    """An image stage; a clip whose pictures are mostly red has a fault, by how red it is."""

    FAULTS = {200: "segv", 160: "loop", 120: "memory", 80: "raise"}

    def __init__(self, side: int = 640, batch: int = 8):
        pass

    def run(self, rows: list[dict], images: list[list[np.ndarray]]) -> list[dict]:
        results = []
        for clip in images:
            mean = clip[0].reshape(-1, 3).mean(axis=0) if clip else np.zeros(3)
            if mean[0] > 4 * max(mean[1], 5):
                level = min(self.FAULTS, key=lambda red: abs(red - mean[0]))
                count_attempt(self.FAULTS[level])
                misbehave(self.FAULTS[level])
            results.append({"ocr_area": 0.25, "ocr_boxes": 1})
        return results


class WrongStage(Ocr):
    """An image stage that loses a row."""

    def __init__(self, side: int = 640, batch: int = 8):
        pass

    def run(self, rows: list[dict], images: list[list[np.ndarray]]) -> list[dict]:
        return [{"ocr_area": 0.0, "ocr_boxes": 0} for _ in rows[1:]]


def name_of(uri: str) -> str:
    return os.path.basename(uri).split(".")[0]


def count_attempt(name: str) -> None:
    """Leave a mark that the test can count (`conftest.attempts`)."""
    with open(os.path.join(os.environ["FAULTY_ATTEMPTS"], os.path.basename(name)), "a") as file:
        file.write("x")


class Calculator:
    """A class as a tool: knows its process, and how often it was asked."""

    def __init__(self, start: int = 0):
        self._asked = start

    def run(self, first: int, second: int) -> tuple[int, int, int]:
        """Their sum, this process, the number of the question. Dies of 13."""
        if first == 13:
            misbehave("segv")
        self._asked += 1
        return first + second, os.getpid(), self._asked


def surroundings(name: str) -> Iterator[object]:
    """A tool that tells a variable of its environment, or what it is to the kernel when memory runs out."""
    if name == "oom_score_adj":
        with open("/proc/self/oom_score_adj") as file:
            yield int(file.read())
    else:
        yield os.environ.get(name)


def shout(text: str) -> Iterator[object]:
    """A tool that says something and dies."""
    yield "before"
    print(text, flush=True)
    os._exit(4)
