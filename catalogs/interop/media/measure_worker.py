"""Facts of a video file that came with a data set: every frame is decoded, as at ingest. Runs in a child process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import cast

from datakit.identity import Span
from datakit.video.metadata import (
    Rhythm,
    check_whole,
    clip_columns,
    damage_errors,
    frame_end,
    nominal_step,
    video_columns,
)
from datakit.video.probe import describe
from datakit.video.reader import VideoReader

ALIVE_S = 1.0


@dataclass(frozen=True)
class MeasureJob:
    uri: str
    size: int | None
    video_id: str
    shard: str


@dataclass(frozen=True)
class Measured:
    """Columns of `videos`, and those of `clips` for the clip that is the whole file."""

    columns: dict
    clip: dict


def measure(job: MeasureJob) -> Iterator[Measured | None]:
    """Raises:
    MediaError: the file cannot be decoded, or ends early.
    """
    told = time.monotonic()
    rhythm = Rhythm()
    with VideoReader(job.uri) as reader:
        pictures = reader.frames()
        first = next(pictures)
        info = describe(reader, first, job.size)
        last = first
        for last in chain([first], pictures):
            rhythm.add(last.pts)
            if time.monotonic() - told > ALIVE_S:
                told = time.monotonic()
                yield None
        base = reader.time_base
        columns = video_columns(info, rhythm, first.pts, base)
        check_whole(info, cast(float, columns["duration_s"]))
        span = Span(first.pts, frame_end(last, nominal_step(info, base)), base)
        clip = clip_columns(job.video_id, job.shard, info, span, (0, rhythm.count), first.pts)
        yield Measured(columns, {**clip, "errors": damage_errors(reader.damage, span)})
