"""Tools for datakit.process.pool that die, and that tell what they have imported."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace

from catalogs.interop.media import cut_worker

FATAL_FRAMES = 46


def cut_clips(job: cut_worker.CutJob) -> Iterator[cut_worker.Written]:
    """Dies of a clip of so many frames: the third of bikes.mp4."""
    for clip in job.clips:
        if clip.num_frames == FATAL_FRAMES:
            os.kill(os.getpid(), signal.SIGKILL)
        yield from cut_worker.cut_clips(replace(job, clips=(clip,)))


def modules(task: str) -> Iterator[list[str]]:
    yield [name for name in ("deltalake", "polars") if name in sys.modules]
