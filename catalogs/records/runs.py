"""The table `runs`: one row a run, written when it starts and completed when it ends."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from catalogs.query.selection import Selection
from catalogs.query.snapshots import author, check_writable
from catalogs.tables.catalog import Catalog
from datakit.version import __version__


def new_run_id() -> str:
    return uuid.uuid4().hex[:16]


@dataclass
class RunRecord:
    """A run under way; what it writes is signed with its id. `stage_cpu_s` grows as work comes back.

    Attributes:
        selection: that it reads, of one snapshot. Its files are kept as long as the run's row is there, and `forget`
            names the run's checkpoints.
    """

    catalog: Catalog
    pipeline: str
    config: dict[str, Any]
    run_id: str = field(default_factory=new_run_id)
    stage_cpu_s: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    selection: Selection | None = None

    def begin(self, finishing_restore: bool = False) -> RunRecord:
        """Enter the run.

        Args:
            finishing_restore: it is a restore: one that was interrupted is no obstacle.

        Raises:
            CatalogError: a restore was interrupted: it has to be finished before anything is written.
        """
        if not finishing_restore:
            check_writable(self.catalog)
        self.catalog.signature = {"run_id": self.run_id, "pipeline": self.pipeline, "author": author()}
        self.catalog.append(
            "runs",
            [
                {
                    "run_id": self.run_id,
                    "pipeline": self.pipeline,
                    "status": "running",
                    "author": author(),
                    "selection": json.dumps(self.selection.as_dict()) if self.selection else None,
                    "started_at": datetime.now(UTC),
                    "config": json.dumps(self.config, sort_keys=True),
                    "code_version": __version__,
                }
            ],
        )
        return self

    @contextmanager
    def running(self, finishing_restore: bool = False) -> Iterator[dict[str, Any]]:
        """Around the whole run: enters it, completes its row with the counts put into what this gives, whatever
        happens."""
        counts: dict[str, Any] = {}
        self.begin(finishing_restore)
        try:
            yield counts
        except BaseException as e:
            self.fail(e)
            raise
        self.end("finished", counts)

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
            "run_id": self.run_id,
            "status": status,
            "finished_at": datetime.now(UTC),
            "counts": json.dumps(counts),
            "stage_cpu_s": json.dumps({k: round(v, 3) for k, v in self.stage_cpu_s.items()}),
            "wall_s": time.monotonic() - self.started,
            "cpu_hours": sum(self.stage_cpu_s.values()) / 3600,
            "snapshot": json.dumps(self.catalog.versions()),
        }
        self._set(row)
        self.catalog.signature = {}

    def fail(self, error: BaseException) -> None:
        """Complete the row of a run that an error or the user ended."""
        self.end(
            "stopped" if isinstance(error, KeyboardInterrupt) else "failed",
            {"error": (str(error) or type(error).__name__)[:500]},
        )

    def checkpoints(self, written: Sequence[tuple[str, int]]) -> None:
        """Record the checkpoints that the run has written and that exist: their paths or addresses, and steps."""
        now = datetime.now(UTC)
        self._set(
            {
                "run_id": self.run_id,
                "checkpoints": [{"path": path, "step": step, "created_at": now} for path, step in written],
            }
        )

    def _set(self, row: dict[str, Any]) -> None:
        self.catalog.upsert("runs", [row], only="update")
