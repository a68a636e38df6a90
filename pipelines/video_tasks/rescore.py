"""Measure given clips of a video again, reading no more of it than they cover. Runs in a child process."""

from __future__ import annotations

import time
from collections.abc import Iterator

from datakit.errors import ErrorKind
from datakit.identity import Span
from datakit.source import check_content
from datakit.video.frame import Picture
from datakit.video.metadata import damage_errors
from datakit.video.reader import SEEK_AHEAD_S, VideoReader
from pipelines.shots.detectors import ContentMeter
from pipelines.video_tasks.grid import GridProbe, GridSummary
from pipelines.video_tasks.messages import ClipBatch, ClipSpan, ScoreJob, VideoFacts


def rescore(job: ScoreJob) -> Iterator[ClipBatch | VideoFacts]:
    """One batch per clip, in order of time; then the CPU seconds.

    Raises:
        MediaError: the source cannot be read, or holds other content now.
    """
    started = time.process_time()
    check_content(job.uri, job.size, job.video_id)
    with VideoReader(job.uri, job.stream) as reader:
        probe = GridProbe(job.stages, job.first_pts, reader.time_base, bool(job.positions))
        walk = _Walk(reader, probe)
        for clip in job.clips:
            span = Span(clip.start_pts, clip.end_pts, reader.time_base)
            summary = GridSummary(job.stages, job.positions)
            changes = _Changes() if job.jitter else None
            seen = 0
            for picture, samples in walk.through(span):
                for sample in samples:
                    summary.add(sample)
                if picture.pts in span:
                    seen += 1
                    if changes is not None:
                        changes.add(picture)
            yield _batch(clip, span, summary, changes, seen, reader, job.jitter)
        spent = dict(probe.cpu_s)
        yield VideoFacts(
            {}, len(job.clips), {"decode": max(0.0, time.process_time() - started - sum(spent.values())), **spent}
        )


def _batch(
    clip: ClipSpan,
    span: Span,
    summary: GridSummary,
    changes: _Changes | None,
    seen: int,
    reader: VideoReader,
    jitter: bool,
) -> ClipBatch:
    measured = summary.measure(span, clip.facts)
    errors = measured.errors + damage_errors(reader.damage, span)
    if not seen:
        errors.append(
            {"stage": "decode", "kind": str(ErrorKind.DECODE), "message": "no frame of the clip could be decoded"}
        )
    row = {"clip_id": clip.clip_id, **clip.facts, **measured.columns, "errors": errors}
    if jitter:
        row["jitter"] = changes.mean() if changes else None
    return ClipBatch([row], [measured.images])


class _Changes:
    """Mean content change between the frames of one clip."""

    def __init__(self) -> None:
        self._meter = ContentMeter()
        self._values: list[float] = []
        self._first = True

    def add(self, picture: Picture) -> None:
        note = self._meter.note(picture)
        if not self._first:
            self._values.append(note.change)
        self._first = False

    def mean(self) -> float | None:
        return sum(self._values) / len(self._values) if self._values else None


class _Walk:
    """Reads clip after clip in order, decoding on where the next one is near and seeking where it is far."""

    def __init__(self, reader: VideoReader, probe: GridProbe):
        self._reader = reader
        self._probe = probe
        self._ahead = int(SEEK_AHEAD_S / reader.time_base)
        self._frames: Iterator[Picture] = iter(())
        self._next: Picture | None = None

    def through(self, span: Span) -> Iterator[tuple[Picture, list]]:
        """Frames from the grid time before the span to its end, each with the grid samples it completes."""
        begin = self._probe.grid_time(span.start_pts)
        near = self._next is not None and self._next.pts <= span.start_pts and begin <= self._next.pts + self._ahead
        if not near:
            self._frames = self._reader.since(begin)
            self._probe.jump(begin)
            self._next = next(self._frames, None)
        while self._next is not None and self._next.pts < span.end_pts:
            picture = self._next
            self._next = next(self._frames, None)
            yield picture, self._probe.push(picture)
