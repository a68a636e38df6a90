"""Tools and stages with faults planted in them. Workers import this module by name."""

from __future__ import annotations

import os
import signal
from typing import Iterator

import numpy as np

from pipelines.jobs import ClipBatch, PassJob, VideoFacts


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
    """`analyse`, but a video named after a fault has it, in the middle of decoding."""
    from pipelines.video_pass import analyse

    count_attempt(job.uri)
    for item in analyse(job):
        yield item
        misbehave(fault_of(job.uri))
    misbehave(fault_of(job.uri))


class FaultyStage:
    """An image stage; a clip whose pictures are mostly red has a fault, by how red it is."""

    name = "ocr"
    FAULTS = {200: "segv", 160: "loop", 120: "memory", 80: "raise"}

    def __init__(self, side: int = 640, batch: int = 8):
        pass

    def run(self, rows: list[dict], images: list[list[np.ndarray]]) -> list[dict]:
        results = []
        for clip in images:
            mean = clip[0].reshape(-1, 3).mean(axis=0) if clip else np.zeros(3)
            if mean[0] > 4 * max(mean[1], 5):
                count_attempt("stage")
                level = min(self.FAULTS, key=lambda red: abs(red - mean[0]))
                misbehave(self.FAULTS[level])
            results.append({"ocr_area": 0.0, "ocr_boxes": 0})
        return results


class WrongStage:
    """An image stage that loses a row."""

    name = "ocr"

    def __init__(self, side: int = 640, batch: int = 8):
        pass

    def run(self, rows: list[dict], images: list[list[np.ndarray]]) -> list[dict]:
        return [{"ocr_area": 0.0, "ocr_boxes": 0} for _ in rows[1:]]


def fault_of(uri: str) -> str:
    return os.path.basename(uri).split(".")[0]


def count_attempt(name: str) -> None:
    """Leave a mark that the test can count."""
    folder = os.environ.get("FAULTY_ATTEMPTS")
    if folder:
        with open(os.path.join(folder, os.path.basename(name)), "a") as file:
            file.write("x")
