"""One sequential pass over a video: frames in, clip rows and pictures out. Runs in a child process.

Decoding, shot detection, division into clips and every grid measurement share the pass; memory is bounded
by the longest clip, whatever the video's length.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from itertools import chain
from typing import cast

from datakit.identity import Span
from datakit.video.frame import Picture
from datakit.video.metadata import Rhythm, check_whole, clip_columns, damage_errors, nominal_step, video_columns
from datakit.video.probe import VideoInfo, describe
from datakit.video.reader import Damage, VideoReader
from pipelines.shots.clip_splitter import BLANK_SPREAD, Divider, FrameMark, Piece
from pipelines.shots.detectors import make_detector
from pipelines.shots.types import Cut
from pipelines.video_tasks.frame_events import (
    SPLIT_FROM_S,
    Event,
    FrameJob,
    FrameRecord,
    Spent,
    measure_frames,
    measure_in_segments,
    stage_failures,
)
from pipelines.video_tasks.grid import GridSummary
from pipelines.video_tasks.messages import Advance, ClipBatch, PassJob, VideoFacts

CLIPS_PER_BATCH = 8


def analyse(job: PassJob) -> Iterator[ClipBatch | Advance | VideoFacts]:
    """Process one video.

    Yields:
        batches of finished clips, how far it is (a sign of life), and last the facts.

    Raises:
        MediaError: when the video as a whole cannot be processed.
    """
    return _VideoPass(job).run()


class _VideoPass:
    def __init__(self, job: PassJob):
        self.job = job
        self.cuts: list[Cut] = []
        self._damage: list[Damage] = []
        self._held: deque[tuple[int, FrameRecord]] = deque()  # frames the detector may still put a cut on
        self._cut_frames: set[int] = set()
        self._batch = ClipBatch([], [])
        self._clip_count = 0
        self._rhythm = Rhythm()
        self._cpu_s: dict[str, float] = {}

    def run(self) -> Iterator[ClipBatch | Advance | VideoFacts]:
        started = time.process_time()
        told = time.monotonic()
        with VideoReader(self.job.uri) as reader:
            for event in self._events(reader):
                for piece in self._take(event):
                    self._finish_clip(piece)
                    if len(self._batch.rows) >= CLIPS_PER_BATCH:
                        yield self._hand_over()
                if time.monotonic() - told > 1.0:
                    told = time.monotonic()
                    yield self._advance()
        for piece in self._drain():
            self._finish_clip(piece)
        columns = self._video_columns()
        check_whole(self.info, cast(float, columns["duration_s"]))
        if self._batch.rows:
            yield self._hand_over()
        here = time.process_time() - started - sum(self._cpu_s.values())
        self._cpu_s["decode"] = self._cpu_s.get("decode", 0.0) + max(0.0, here)
        yield VideoFacts(columns, self._clip_count, self._cpu_s)

    def _advance(self) -> Advance:
        seconds = float((self._rhythm.last - self._first_pts) * self._time_base)
        return Advance(seconds, min(1.0, seconds / self.info.expected_s) if self.info.expected_s else 0.0)

    def _events(self, reader: VideoReader) -> Iterator[Event]:
        """Events of all frames, from this process or from helpers. Sets up what the first frame decides."""
        pictures = reader.frames()
        first = next(pictures)
        self._begin(reader, first)
        job = FrameJob(
            self.job.uri,
            self.job.stages,
            bool(self.job.positions),
            self.job.detector.name == "transnet",
            first.pts,
            reader.time_base,
            self.info.stream,
        )
        self._damage = reader.damage
        duration = self.info.expected_s or 0.0
        if self.job.threads > 1 and duration >= SPLIT_FROM_S:
            return measure_in_segments(job, duration, self.job.threads, self.job.limits)
        return measure_frames(job, reader, chain([first], pictures))

    def _begin(self, reader: VideoReader, first: Picture) -> None:
        self.info: VideoInfo = describe(reader, first, self.job.size)
        self._first_pts = first.pts
        self._time_base = reader.time_base
        self._nominal = nominal_step(self.info, self._time_base)
        self._detector = make_detector(self.job.detector, self.info.fps or 25.0, self._time_base)
        self._divider = Divider(self.job.min_s, self.job.max_s, self.job.trim_frames, self._time_base)
        self._longest_pause = self.job.max_s / self._time_base
        self._summary = GridSummary(self.job.stages, self.job.positions)

    def _take(self, event: Event) -> list[Piece]:
        if isinstance(event, FrameRecord):
            self._held.append((self._rhythm.count, event))
            self._rhythm.add(event.pts)
            with stage_failures("shots"):
                self._note_cuts(self._detector.feed(event.pts, event.note))
            return self._release(self._detector.settled)
        if isinstance(event, Spent):
            self._cpu_s = dict(event.cpu_s)
        elif isinstance(event, Damage):
            self._damage.append(event)
        else:
            self._summary.forget(self._oldest_needed(event.pts))
            self._summary.add(event)
        return []

    def _oldest_needed(self, now: int) -> int:
        """Samples before this timestamp can belong to no clip still to come."""
        open_pts = self._divider.open_pts
        if open_pts is None:
            open_pts = self._held[0][1].pts if self._held else now
        return min(open_pts, now)

    def _drain(self) -> list[Piece]:
        with stage_failures("shots"):
            self._note_cuts(self._detector.finish())
        return self._release(self._detector.settled, last=True) + self._divider.finish()

    def _note_cuts(self, cuts: list[Cut]) -> None:
        self.cuts += cuts
        self._cut_frames.update(c.frame for c in cuts)

    def _release(self, settled: int, last: bool = False) -> list[Piece]:
        """Hand frames that no cut can land on any more to the divider, each once its successor is known."""
        pieces: list[Piece] = []
        while self._held and self._held[0][0] < settled and (last or len(self._held) > 1):
            index, record = self._held.popleft()
            following = self._held[0][1].pts if self._held else None
            pieces += self._divider.push(self._mark(index, record, following))
        return pieces

    def _mark(self, index: int, record: FrameRecord, following: int | None) -> FrameMark:
        own = record.duration or self._nominal
        reach = own if following is None else following - record.pts
        if reach > self._longest_pause and following is not None:
            reach = own
            self._cut_frames.add(index + 1)  # the stream has a gap: a shot does not reach across
        dark = record.note.mean < self.job.fade_level
        return FrameMark(
            index,
            record.pts,
            reach,
            record.note.change,
            dark,
            blank=dark and record.note.spread < BLANK_SPREAD,
            cut=index in self._cut_frames,
            transition=index in self._detector.transitions,
        )

    def _finish_clip(self, piece: Piece) -> None:
        span = Span(piece.start_pts, piece.end_pts, self._time_base)
        measured = self._summary.measure(span)
        row = clip_columns(
            self.job.video_id, self.job.shard, self.info, span, (piece.start_frame, piece.end_frame), self._first_pts
        )
        errors = measured.errors + damage_errors(self._damage, span)
        self._batch.rows.append({**row, **measured.columns, "jitter": piece.change, "errors": errors})
        self._batch.images.append(measured.images)
        self._clip_count += 1

    def _hand_over(self) -> ClipBatch:
        batch, self._batch = self._batch, ClipBatch([], [])
        return batch

    def _video_columns(self) -> dict[str, object]:
        columns = video_columns(self.info, self._rhythm, self._first_pts, self._time_base)
        return {**columns, "cuts": [{"frame": c.frame, "pts": c.pts, "score": c.score} for c in self.cuts]}
