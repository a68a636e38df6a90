"""Grid stages over a whole video taken as one clip."""

from __future__ import annotations

from datakit.identity import Span
from datakit.video.reader import VideoReader
from pipelines.video_tasks.grid import GRID_STAGES, GridProbe, GridSummary


def measure(path, stages=tuple(GRID_STAGES), positions=()):
    """Columns, errors and pictures of a video taken as one clip."""
    with VideoReader(str(path)) as reader:
        probe = summary = None
        last = None
        for picture in reader.frames():
            if probe is None:
                options = {name: {} for name in stages}
                probe = GridProbe(options, picture.pts, reader.time_base, bool(positions))
                summary = GridSummary(options, positions)
                first = picture.pts
            for sample in probe.push(picture):
                summary.add(sample)
            last = picture.pts
        return summary.measure(Span(first, last + 1, reader.time_base))
