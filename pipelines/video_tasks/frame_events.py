"""What every frame of a video leaves behind: shot notes and grid samples, in order.

Either in this process, frame by frame; or, for a long video while CPUs lie idle, by helper processes that
each take a segment between two key frames. Both give the same events.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial

from datakit.errors import ErrorKind, MediaError
from datakit.process.child import Child
from datakit.process.messages import Done, Failed, ToolSpec
from datakit.video.frame import Picture
from datakit.video.reader import GRID_S, Damage, VideoReader
from pipelines.shots.detectors import ContentMeter
from pipelines.shots.types import FrameNote
from pipelines.stages.base import GridStages
from pipelines.video_tasks.grid import FrameSample, GridProbe, PairSample, grid_slot

SEGMENT_S = 20.0
"""Length of the segments that helpers take; long enough to make hand-over cheap, short enough to share."""
SPLIT_FROM_S = 60.0
"""Shorter videos are not divided."""
BURST_BYTES = 6 << 20
EVENTS_PER_MESSAGE = 100


@dataclass(frozen=True, slots=True)
class FrameRecord:
    """A frame as shot detection and the division into clips see it. `duration` 0: unknown."""

    pts: int
    duration: int
    note: FrameNote


@dataclass(frozen=True, slots=True)
class Spent:
    """CPU seconds by stage; the last event."""

    cpu_s: dict[str, float]


Event = FrameRecord | FrameSample | PairSample | Damage | Spent


@dataclass(frozen=True)
class FrameJob:
    """Which frames to measure, and how.

    Attributes:
        stages: what to measure at the grid.
        with_images: whether grid samples carry pictures.
        thumbnails: whether notes carry the 48x27 pictures that TransNetV2 looks at.
        first_pts: timestamp of the video's first frame: the origin of the grid.
        start_pts, end_pts: the segment (helpers only): from a key frame to the next segment's.
    """

    uri: str
    stages: GridStages
    with_images: bool
    thumbnails: bool
    first_pts: int
    time_base: Fraction
    stream: int
    start_pts: int | None = None
    end_pts: int | None = None


def measure_frames(job: FrameJob, reader: VideoReader, pictures: Iterator[Picture]) -> Iterator[Event]:
    """Events of the given pictures, which go on one frame (and the partners of pairs) past `end_pts`."""
    content = ContentMeter(job.thumbnails)
    probe = GridProbe(job.stages, job.first_pts, reader.time_base, job.with_images)
    shots_cpu = 0.0
    beyond = False
    for picture in _in_bursts(pictures):
        past = job.end_pts is not None and picture.pts >= job.end_pts
        if not past or not beyond:
            started = time.thread_time()
            with stage_failures("shots"):
                note = content.note(picture)
            shots_cpu += time.thread_time() - started
            yield FrameRecord(picture.pts, picture.duration, note)
        beyond = past
        yield from probe.push(picture, pairs_only=past)
        if past and not probe.waits:
            break
    yield Spent({"shots": shots_cpu, **probe.cpu_s})


def measure_segment(job: FrameJob) -> Iterator[list[Event]]:
    """A helper's work: the events of one segment, in messages."""
    started = time.process_time()
    assert job.start_pts is not None, "a segment begins somewhere"
    with VideoReader(job.uri, job.stream) as reader:
        message: list[Event] = []
        for event in measure_frames(job, reader, reader.since(job.start_pts)):
            if isinstance(event, Spent):
                rest = time.process_time() - started - sum(event.cpu_s.values())
                event = Spent({"decode": rest, **event.cpu_s})
                message += reader.damage
            message.append(event)
            if len(message) >= EVENTS_PER_MESSAGE:
                yield message
                message = []
        yield message


def measure_in_segments(job: FrameJob, duration_s: float, helpers: int, limits: ToolSpec) -> Iterator[Event]:
    """The events of the whole video, measured by helper processes a segment each.

    Args:
        duration_s: of the video, by its header.
        helpers: how many processes.
        limits: gives a helper's memory and patience.
    """
    spec = replace(limits, target="pipelines.video_tasks.frame_events:measure_segment", options={})
    crew = [Child(spec, fork=True) for _ in range(helpers)]  # this process has a single thread so far
    idle: queue.SimpleQueue[Child] = queue.SimpleQueue()
    for child in crew:
        child.start()
        idle.put(child)
    boundaries = key_frames(job.uri, job.stream, job.first_pts, duration_s)
    segments = deque(replace(job, start_pts=a, end_pts=b) for a, b in zip(boundaries, [*boundaries[1:], None]))
    joiner = _Joiner()
    pool = ThreadPoolExecutor(helpers)

    def start_next() -> None:
        if segments:
            segment = segments.popleft()
            ahead.append((segment, pool.submit(_run_segment, segment, idle)))

    ahead: deque = deque()
    try:
        for _ in range(2 * helpers):
            start_next()
        while ahead:
            segment, events = ahead.popleft()
            yield from joiner.join(segment, events.result())
            start_next()
        yield joiner.spent
    finally:
        for child in crew:
            child.stop()
        pool.shutdown(cancel_futures=True)


def key_frames(uri: str, stream: int, first_pts: int, duration_s: float) -> list[int]:
    """Timestamps of key frames about `SEGMENT_S` apart, by seeking and decoding one frame each.

    Returns:
        rising, the first is `first_pts`; only that one where the container cannot seek.
    """
    boundaries = [first_pts]
    with VideoReader(uri, stream) as reader:
        for number in range(1, int(duration_s / SEGMENT_S)):
            target = first_pts + round(number * SEGMENT_S / reader.time_base)
            picture = reader.key_frame_before(target)
            if picture is None:
                return [first_pts]
            if picture.pts > boundaries[-1]:
                boundaries.append(picture.pts)
    return boundaries


@contextmanager
def stage_failures(stage: str) -> Iterator[None]:
    """Whatever goes wrong inside is that stage's failure on this video."""
    try:
        yield
    except MediaError:
        raise
    except Exception as e:
        raise MediaError(ErrorKind.STAGE, f"{type(e).__name__}: {e}"[:500], stage) from e


def _run_segment(job: FrameJob, idle: queue.SimpleQueue[Child]) -> list[Event]:
    child = idle.get()
    events: list[Event] = []
    try:
        for item in child.stream(job):
            if isinstance(item, Failed):
                raise MediaError(item.kind, item.message, item.stage)
            if not isinstance(item, Done):
                events += item
        return events
    finally:
        idle.put(child)


class _Joiner:
    """Makes the events of consecutive segments those of one pass.

    A helper takes its segment's first frame for a grid frame and compares it to nothing; the helper before
    saw that frame too, and knows what changed.
    """

    def __init__(self) -> None:
        self.spent = Spent({})
        self._last_pts: int | None = None
        self._bridge: FrameRecord | None = None

    def join(self, segment: FrameJob, events: list[Event]) -> Iterator[Event]:
        first = next(e for e in events if isinstance(e, FrameRecord))
        bridge, self._bridge = self._bridge, None
        if bridge is not None and bridge.pts != first.pts:
            raise MediaError(ErrorKind.DECODE, f"seeking is not exact at pts {segment.start_pts}")
        slot = partial(grid_slot, start=segment.first_pts, step=GRID_S / segment.time_base)
        not_grid = bridge is not None and self._last_pts is not None and slot(self._last_pts) == slot(first.pts)
        yield from (e for e in events if isinstance(e, Damage))  # before the clips that lie on it
        for event in events:
            if isinstance(event, FrameRecord):
                if segment.end_pts is not None and event.pts >= segment.end_pts:
                    self._bridge = event
                else:
                    self._last_pts = event.pts
                    yield bridge if bridge is not None and event is first else event
            elif isinstance(event, Spent):
                for stage, cpu_s in event.cpu_s.items():
                    self.spent.cpu_s[stage] = self.spent.cpu_s.get(stage, 0.0) + cpu_s
            elif not isinstance(event, Damage) and not (not_grid and event.pts == first.pts):
                yield event


def _in_bursts(pictures: Iterator[Picture]) -> Iterator[Picture]:
    """The same pictures, decoded a few at a time where they are small.

    The decoder and the measurements push each other's data out of the CPU's cache; taking turns every few
    frames instead of every frame saves 5 % of the pass at 720p.
    """
    burst: list[Picture] = []
    for picture in pictures:
        burst.append(picture)
        size = sum(plane.buffer_size for plane in picture.frame.planes)
        if picture.index == 0 or size * len(burst) >= BURST_BYTES:
            yield from burst
            burst.clear()
    yield from burst
