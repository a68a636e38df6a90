"""What crosses process boundaries: jobs for the video tools, and what they give back.

Plain values, light to import: the driver makes jobs without loading a decoder.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from datakit.process.messages import ToolSpec
from pipelines.shots.options import DetectorOptions

if TYPE_CHECKING:
    import numpy as np

    from pipelines.stages.base import GridStages


@dataclass(frozen=True)
class PassJob:
    """A video to analyse and how. Plain values: it crosses process boundaries."""

    video_id: str
    uri: str
    shard: str
    size: int
    detector: DetectorOptions = DetectorOptions()
    min_s: float = 2.0
    max_s: float = 8.0
    trim_frames: int = 0
    fade_level: float = 12.0
    stages: GridStages = field(default_factory=dict)
    positions: tuple[float, ...] = ()  # where image stages look in a clip; empty: no pictures wanted
    threads: int = 1  # more: a long video is measured by that many helper processes
    limits: ToolSpec = ToolSpec("")  # memory and patience of a helper


@dataclass(frozen=True, slots=True)
class Advance:
    """How far a video is: seconds of it done, and their share of the whole (0 where its length is unknown)."""

    seconds: float = 0.0
    share: float = 0.0


@dataclass
class ClipBatch:
    """Finished clips of one video: rows of the `clips` table, and for each its pictures
    (uint8 RGB [h, w, 3], longer side at most 640)."""

    rows: list[dict]
    images: list[list[np.ndarray]]


@dataclass
class VideoFacts:
    """What the pass learned about the video: columns of its `videos` row, and CPU seconds by stage."""

    columns: dict[str, object]
    clip_count: int
    cpu_s: dict[str, float]


CLIP_FACTS = ("width", "height", "crop_x", "crop_y", "crop_width", "crop_height")
"""Columns of a clip that whoever looks at its pictures needs: its size and crop box."""


@dataclass(frozen=True)
class ClipSpan:
    """A clip of the catalog, as a job refers to it. `facts`: what else stages know of it, its size and crop box."""

    clip_id: str
    start_pts: int
    end_pts: int
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ScoreJob:
    """Clips of one video to measure again, in order of time.

    `first_pts` is the timestamp of the video's first frame, the origin of the candidate grid; `size` and
    `video_id` tell whether the address still holds the same content.
    """

    video_id: str
    uri: str
    size: int | None
    stream: int
    first_pts: int
    clips: tuple[ClipSpan, ...]
    stages: GridStages = field(default_factory=dict)
    jitter: bool = False
    positions: tuple[float, ...] = ()


@dataclass(frozen=True)
class CaptionJob:
    """Clips of one video to show to a model, in order of time: `fps` frames a second, at most `frames` a clip,
    the longer side `side` pixels. `facts` of a clip: its size and crop box, and what the prompts ask for."""

    video_id: str
    uri: str
    size: int | None
    stream: int
    clips: tuple[ClipSpan, ...]
    fps: float
    frames: int
    side: int


CLIPS_A_BATCH = 4
"""Clips that travel to a language model together: halves what Ray takes of a caption."""
CLIP_FOLDER = "clip_files"
"""Of a catalog; not inside the table `clips`, whose vacuum deletes what is not its own."""


@dataclass(frozen=True)
class FileJob:
    """Clips of one video to write as files below `root`, re-encoded (`cut`) or stream-copied (`copy`)."""

    video_id: str
    uri: str
    size: int | None
    stream: int
    clips: tuple[ClipSpan, ...]
    root: str
    mode: str
