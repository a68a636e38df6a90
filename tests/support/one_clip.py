"""Grid stages over a whole video taken as one clip."""

from __future__ import annotations

from datakit.identity import Span
from datakit.video.reader import VideoReader
from pipelines.executor.flow_setup import grid_stages
from pipelines.settings import Settings
from pipelines.stages.registry import STAGES, on_grid
from pipelines.video_tasks.grid import GridProbe, GridSummary


def measure(path, stages=tuple(on_grid(STAGES)), positions=()):
    """Columns, errors and pictures of a video taken as one clip."""
    with VideoReader(str(path)) as reader:
        probe = summary = None
        last = None
        for picture in reader.frames():
            if probe is None:
                made = grid_stages(list(stages), Settings())
                probe = GridProbe(made, picture.pts, reader.time_base, bool(positions))
                summary = GridSummary(made, positions)
                first = picture.pts
            for sample in probe.push(picture):
                summary.add(sample)
            last = picture.pts
        return summary.measure(Span(first, last + 1, reader.time_base))
