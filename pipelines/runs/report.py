"""How far an ingest is, and what it did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from catalogs.query.funnel import Funnel


@dataclass
class Progress:
    """Where a run is, for whoever shows it."""

    found: int = 0
    listing: bool = True
    registered: int = 0
    done: int = 0
    quarantined: int = 0
    clips: int = 0
    video_s: float = 0.0  # of finished videos
    running_s: float = 0.0  # of those being worked on
    bytes: int = 0  # of registered videos
    bytes_done: float = 0.0  # a part for those being worked on
    phase: str = "processing"


@dataclass
class Report:
    """What a run did."""

    run_id: str
    funnel: Funnel
    counts: dict[str, int]
    ignored_files: int
    stage_cpu_s: dict[str, float]
    wall_s: float
    clip_files: dict[str, int] | None = None  # see `clip_files.file_counts`; None: virtual clips

    @property
    def cpu_hours_per_kept_hour(self) -> float | None:
        """CPU-hours of this run per hour of kept footage in the catalog; None without any."""
        kept = self.funnel.hours.get("kept", 0.0)
        return sum(self.stage_cpu_s.values()) / 3600 / kept if kept else None
