"""The row of the table `runs` for a training run: entered when it begins, kept through every resume, completed when it
ends."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import polars as pl

from catalogs.query.snapshots import author, check_writable
from catalogs.records.latents import TABLE as LATENTS
from catalogs.records.runs import new_run_id
from catalogs.tables.catalog import Catalog
from datakit.errors import CatalogError
from datakit.version import __version__
from trainer.planning.plan import Part


@dataclass(frozen=True)
class _Entry:
    """A row: of one part of the plan, in its catalog. The rest is what the run's earlier lives left there."""

    part: Part
    catalog: Catalog
    row_id: str
    wall_s: float
    gpu_hours: float
    written: dict[str, datetime]


@dataclass
class TrainingRecord:
    """A training run as catalogs know it. Its rows keep the files of the selections from vacuum, and let `forget` name
    its checkpoints; what it writes is signed with its id.

    A catalog has one row whose id is the run's. Where further parts of the plan are of the same catalog, each has a row
    of its own, `part2-RUN` and so on, for the sake of its selection.

    Attributes:
        catalogs: of the plan's parts, by address.
        gpus: that it uses, of all nodes.
    """

    run_id: str
    catalogs: dict[str, Catalog]
    gpus: int = 0
    _entries: list[_Entry] = field(default_factory=list)
    _began: float = field(default_factory=time.monotonic)

    @classmethod
    def open(
        cls, parts: Sequence[Part], pipeline: str, config: dict[str, Any], run_id: str | None = None, gpus: int = 0
    ) -> TrainingRecord:
        """Enter a run, or go on with one. Only one process of it does.

        Args:
            parts: of the plan.
            pipeline: `train dit` …
            config: resolved settings, and what else there is to know (the plan's hash, its folder).
            run_id: of a run that is resumed; None: a new one.

        Raises:
            CatalogError: a catalog is not there, or a restore of it was interrupted.
        """
        record = cls(run_id or new_run_id(), {}, gpus)
        for part in parts:
            if part.catalog not in record.catalogs:
                record.catalogs[part.catalog] = _opened(part)
        seen: dict[str, int] = {}
        for part in parts:
            number = seen[part.catalog] = seen.get(part.catalog, 0) + 1
            catalog = record.catalogs[part.catalog]
            catalog.signature = {"run_id": record.run_id, "pipeline": pipeline, "author": author()}
            row_id = record.run_id if number == 1 else f"part{number}-{record.run_id}"
            record._entries.append(_enter(part, catalog, row_id, pipeline, config))
        return record

    def reads_latents(self, versions: Mapping[str, int]) -> None:
        """Keep the files of cached latents from vacuum, too: they are encoded after the plan's snapshot.

        Args:
            versions: of the table `latents`, by catalog (`trainer.latents.index.Located`).
        """
        for entry in self._entries:
            selection = entry.part.selection
            read = {**selection["versions"], LATENTS: versions[entry.part.catalog]}
            _set(entry, {"selection": json.dumps({**selection, "versions": read})})

    def checkpoints(self, written: Sequence[tuple[str, int]], counts: dict[str, Any] | None = None) -> None:
        """Record the checkpoints that exist: their paths or addresses, and steps; and what was counted so far."""
        now = datetime.now(UTC)
        for entry in self._entries:
            for path, _ in written:
                entry.written.setdefault(path, now)
            listed = [{"path": path, "step": step, "created_at": entry.written[path]} for path, step in written]
            _set(
                entry,
                {
                    "checkpoints": listed,
                    **self._spent(entry),
                    **({"counts": json.dumps(counts)} if counts is not None else {}),
                },
            )

    def end(self, status: str, counts: dict[str, Any]) -> None:
        """Complete the rows.

        Args:
            status: `finished`, `stopped` (it can go on) or `failed`.
        """
        if status == "finished":  # a commit for each checkpoint, a file for each shard: joined now
            for catalog in self.catalogs.values():
                catalog.compact("losses")
        for entry in self._entries:
            _set(
                entry,
                {
                    "status": status,
                    "finished_at": datetime.now(UTC),
                    "counts": json.dumps(counts),
                    **self._spent(entry),
                    "snapshot": json.dumps(entry.catalog.versions()),
                },
            )

    def fail(self, error: BaseException, counts: dict[str, Any] | None = None) -> None:
        """Complete the rows of a run that an error or the user ended."""
        said = (str(error) or type(error).__name__)[:500]
        self.end("stopped" if isinstance(error, KeyboardInterrupt) else "failed", {**(counts or {}), "error": said})

    def _spent(self, entry: _Entry) -> dict[str, float]:
        """Time of all lives of the run, as far as they recorded it."""
        elapsed = time.monotonic() - self._began
        hours = {"gpu_hours": entry.gpu_hours + elapsed * self.gpus / 3600} if self.gpus or entry.gpu_hours else {}
        return {"wall_s": entry.wall_s + elapsed, **hours}


def _opened(part: Part) -> Catalog:
    try:
        catalog = Catalog(part.catalog)
        check_writable(catalog)
    except CatalogError as e:
        raise CatalogError(f"part {part.name} of the plan: {e} (write_back=false trains without writing to it)") from e
    return catalog


def _enter(part: Part, catalog: Catalog, row_id: str, pipeline: str, config: dict[str, Any]) -> _Entry:
    """Make a row, or take up one that is there."""
    there = catalog.scan("runs").filter(pl.col("run_id") == row_id).collect().to_dicts()
    now = {
        "status": "running",
        "config": json.dumps(config, sort_keys=True),
        "code_version": __version__,
        "author": author(),
    }
    if there:
        row = there[0]
        written = {c["path"]: c["created_at"] for c in row["checkpoints"] or []}
        entry = _Entry(part, catalog, row_id, row["wall_s"] or 0.0, row["gpu_hours"] or 0.0, written)
        _set(entry, {**now, "finished_at": None})
        return entry
    catalog.append(
        "runs",
        [
            {
                "run_id": row_id,
                "pipeline": pipeline,
                "selection": json.dumps(part.selection),
                "started_at": datetime.now(UTC),
                **now,
            }
        ],
    )
    return _Entry(part, catalog, row_id, 0.0, 0.0, {})


def _set(entry: _Entry, values: dict[str, Any]) -> None:
    entry.catalog.upsert("runs", [{"run_id": entry.row_id, **values}], only="update")
