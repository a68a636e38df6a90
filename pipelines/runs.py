"""The table `runs`: one row a run, written when it starts and completed when it ends."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import polars as pl

import datakit
from catalogs.tables import Catalog, polars_schema


def new_run_id() -> str:
    return uuid.uuid4().hex[:16]


@dataclass
class RunRecord:
    """A run under way. `stage_cpu_s` grows as work comes back."""

    catalog: Catalog
    pipeline: str
    config: dict[str, Any]
    run_id: str = field(default_factory=new_run_id)
    stage_cpu_s: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def begin(self) -> RunRecord:
        self.catalog.append("runs", [{
            "run_id": self.run_id, "pipeline": self.pipeline, "status": "running",
            "started_at": datetime.now(timezone.utc), "config": json.dumps(self.config, sort_keys=True),
            "code_version": datakit.__version__,
        }])
        return self

    def spend(self, cpu_s: dict[str, float]) -> None:
        for stage, seconds in cpu_s.items():
            self.stage_cpu_s[stage] = self.stage_cpu_s.get(stage, 0.0) + seconds

    def end(self, status: str, counts: dict[str, Any]) -> None:
        """Complete the row.

        Args:
            status: `finished`, `stopped` (by the user) or `failed`.
            counts: the funnel, or what else the run counted.
        """
        row = {
            "run_id": self.run_id, "status": status, "finished_at": datetime.now(timezone.utc),
            "counts": json.dumps(counts), "stage_cpu_s": json.dumps({k: round(v, 3) for k, v in self.stage_cpu_s.items()}),
            "wall_s": time.monotonic() - self.started, "cpu_hours": sum(self.stage_cpu_s.values()) / 3600,
        }
        types = {name: kind for name, kind in polars_schema("runs").items() if name in row}
        how = {"on": "t.run_id = s.run_id", "set": {name: f"s.{name}" for name in row if name != "run_id"}}
        self.catalog.update("runs", lambda table: (pl.DataFrame([row], schema=types), how))
