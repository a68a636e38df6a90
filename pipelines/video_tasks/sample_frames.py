"""Frames of clips for a model that describes them. Runs in a child process."""

from __future__ import annotations

import time
from collections.abc import Iterator

import cv2
import numpy as np

from datakit.errors import ErrorKind, MediaError
from datakit.identity import Span
from datakit.source import check_content
from datakit.video.frame import fit
from datakit.video.reader import VideoReader
from pipelines.video_tasks.messages import CLIPS_A_BATCH, CaptionJob, ClipBatch, ClipSpan, VideoFacts


def sample(job: CaptionJob) -> Iterator[ClipBatch | VideoFacts]:
    """Batches of clips, in order of time; then the CPU seconds. A clip without a frame has an error.

    Raises:
        MediaError: the source cannot be read, or holds other content now.
    """
    started = time.process_time()
    check_content(job.uri, job.size, job.video_id)
    with VideoReader(job.uri, job.stream) as reader:
        for start in range(0, len(job.clips), CLIPS_A_BATCH):
            shown = [_show(reader, clip, job) for clip in job.clips[start : start + CLIPS_A_BATCH]]
            yield ClipBatch([row for row, _ in shown], [images for _, images in shown])
    yield VideoFacts({}, len(job.clips), {"decode": time.process_time() - started})


def frame_times(span: Span, fps: float, most: int) -> list[int]:
    """Where to look, as PTS: as many frames as `fps` gives, at most `most`, each in the middle of its share."""
    count = max(1, min(most, round(span.seconds * fps)))
    length = span.end_pts - span.start_pts
    return [span.start_pts + (2 * i + 1) * length // (2 * count) for i in range(count)]


def _show(reader: VideoReader, clip: ClipSpan, job: CaptionJob) -> tuple[dict, list[np.ndarray]]:
    """The row and the frames of a clip."""
    span = Span(clip.start_pts, clip.end_pts, reader.time_base)
    row = {"clip_id": clip.clip_id, **clip.facts, "times": [], "duration_s": span.seconds, "errors": []}
    frames: dict[int, np.ndarray] = {}
    try:
        # A frame is shown until the next one: what is on at a time is the last frame at or before it. The
        # reader gives the first at or after, which is as good, but beyond the last frame there is none.
        for _, picture in reader.at(frame_times(span, job.fps, job.frames)):
            if picture.pts in span:
                frames.setdefault(picture.pts, inside(picture.rgb(), clip.facts, job.side))
        if not frames:
            frames = {p.pts: inside(p.rgb(), clip.facts, job.side) for p in _first(reader, span)}
    except MediaError as e:
        row["errors"] = [{"stage": "caption", "kind": str(e.kind), "message": e.message}]
    if not frames and not row["errors"]:
        row["errors"] = [
            {"stage": "caption", "kind": str(ErrorKind.DECODE), "message": "no frame of the clip could be decoded"}
        ]
    if row["errors"]:
        return row, []
    row["times"] = [float((pts - span.start_pts) * reader.time_base) for pts in frames]
    return row, list(frames.values())


def _first(reader: VideoReader, span: Span) -> list:
    return [picture for picture, _ in zip(reader.span(span), range(1))]


def inside(image: np.ndarray, facts: dict, side: int) -> np.ndarray:
    """The picture inside the crop box, its longer side at most `side` pixels. uint8 RGB [h, w, 3]."""
    if facts.get("crop_width") is not None:
        x, y = facts["crop_x"], facts["crop_y"]
        image = image[y : y + facts["crop_height"], x : x + facts["crop_width"]]
    size = fit(image.shape[1], image.shape[0], side)
    return (
        cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        if size != image.shape[1::-1]
        else np.ascontiguousarray(image)
    )
