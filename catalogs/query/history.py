"""Who wrote what, and when: the commits of all tables, and the runs they were part of."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import polars as pl

from catalogs.tables.catalog import RESTORING, Catalog
from catalogs.tables.schema import RECORDS, TABLES

COMMITS = {
    "time": pl.Datetime("us", "UTC"),
    "table": pl.String,
    "version": pl.Int64,
    "operation": pl.String,
    "run_id": pl.String,
    "pipeline": pl.String,
    "author": pl.String,
    "added": pl.Int64,
    "removed": pl.Int64,
    "updated": pl.Int64,
}
WORDS = {"WRITE Overwrite": "rewritten", "WRITE Append": "appended", "RESTORE": "restored", "OPTIMIZE": "compacted"}


def history(catalog: Catalog) -> pl.DataFrame:
    """Every commit to a table of data, oldest first: `time` (UTC), `table`, `version`, `operation`, `run_id`,
    `pipeline`, `author` (null: not by a run), rows `added`, `removed`, `updated` (null: not known)."""
    rows = [row for name in TABLES if name not in RECORDS for row in commits(catalog, name)]
    return pl.DataFrame(rows, schema=COMMITS).sort("time", "table", "version")


def runs(catalog: Catalog) -> pl.DataFrame:
    """One row for each run that wrote, and for each stretch of commits outside of runs, oldest first.

    Columns: `time` of the last commit; `snapshot`, what to type to get the catalog as it was then; `pipeline`,
        `author`,
    `status` of the run; `changes`, in words; `clips`, `kept` as the run counted them; `tags` that name a version it
    wrote and no later run changed.
    """
    steps = history(catalog).filter(~pl.col("operation").is_in(["CREATE TABLE"]))
    stretch = (pl.col("run_id").ne_missing(pl.col("run_id").shift()) & pl.col("run_id").is_null()).cum_sum()
    steps = steps.with_columns(pl.coalesce("run_id", pl.format("outside {}", stretch)).alias("part"))
    with catalog.reading():
        tagged = _tags(catalog)
        listed = catalog.scan("runs").select("run_id", "status", "counts", "snapshot").collect()
    known = {row["run_id"]: row for row in listed.iter_rows(named=True)}
    rows = [
        _row(group, known.get(group["run_id"][0]), tagged) for _, group in steps.group_by("part", maintain_order=True)
    ]
    kinds = {
        "time": COMMITS["time"],
        "snapshot": pl.String,
        "pipeline": pl.String,
        "author": pl.String,
        "status": pl.String,
        "changes": pl.String,
        "clips": pl.Int64,
        "kept": pl.Int64,
        "tags": pl.List(pl.String),
    }
    return pl.DataFrame(rows, schema=kinds).sort("time")


def commits(catalog: Catalog, name: str) -> list[dict]:
    """The commits of one table, newest first; those that only cleaned up left out."""
    rows = []
    for info in catalog.table(name).history():
        operation = info.get("operation", "")
        if operation.startswith("VACUUM"):
            continue
        if operation == "WRITE":
            operation = f"WRITE {info.get('operationParameters', {}).get('mode', '')}".strip()
        rows.append(
            {
                "time": datetime.fromtimestamp(info["timestamp"] / 1000, UTC),
                "table": name,
                "version": info["version"],
                "operation": operation,
                **{key: info.get(key) for key in ("run_id", "pipeline", "author")},
                **_changed_rows(operation, info.get("operationMetrics") or info),
            }
        )
    return rows


def _changed_rows(operation: str, metrics: dict) -> dict[str, int | None]:
    """Rows that a commit changed, as far as its metrics say."""
    if operation == "MERGE":
        keys = {
            "added": "num_target_rows_inserted",
            "removed": "num_target_rows_deleted",
            "updated": "num_target_rows_updated",
        }
    elif operation == "DELETE":
        keys = {"removed": "num_deleted_rows"}
    else:
        keys = {"added": "num_added_rows"}
    return {key: int(metrics[theirs]) if theirs in metrics else None for key, theirs in keys.items()}


def _tags(catalog: Catalog) -> list[tuple[str, dict[str, int]]]:
    rows = (
        catalog.scan("tags").filter(pl.col("name") != RESTORING).sort("created_at").select("name", "versions").collect()
    )
    return [(name, json.loads(versions)) for name, versions in rows.iter_rows()]


def _row(group: pl.DataFrame, run: dict | None, tagged: list[tuple[str, dict[str, int]]]) -> dict:
    last = group.row(-1, named=True)
    counts = json.loads((run or {}).get("counts") or "{}").get("funnel", {})
    snapshot = last["run_id"] if run and run["snapshot"] else f"{last['time']:%Y-%m-%dT%H:%M:%S.%f}"
    wrote = dict(group.group_by("table").agg(pl.col("version").max()).iter_rows())
    at_end = json.loads(run["snapshot"]) if run and run["snapshot"] else None
    return {
        "time": last["time"],
        "snapshot": snapshot,
        "pipeline": last["pipeline"],
        "author": last["author"],
        "status": run["status"] if run else None,
        "changes": _changes(group),
        "clips": counts.get("clips"),
        "kept": counts.get("kept"),
        "tags": [
            name for name, versions in tagged if at_end == versions or (at_end is None and _holds(versions, wrote))
        ],
    }


def _holds(versions: dict[str, int], wrote: dict[str, int]) -> bool:
    return all(versions.get(table) == version for table, version in wrote.items())


def _changes(group: pl.DataFrame) -> str:
    """For example `videos +12, clips +310 ~310, decisions rewritten (310)`."""
    parts = []
    for (table,), steps in group.group_by("table", maintain_order=True):
        words = []
        for operation in steps["operation"].unique(maintain_order=True):
            some = steps.filter(pl.col("operation") == operation)
            if operation in ("WRITE Append", "MERGE", "DELETE"):
                continue
            rows = some["added"][-1]
            word = WORDS.get(operation) or operation.lower()
            words.append(f"{word} ({rows})" if rows and operation == "WRITE Overwrite" else word)
        small = steps.filter(pl.col("operation").is_in(["WRITE Append", "MERGE", "DELETE"]))
        marks = {"+": small["added"].sum(), "~": small["updated"].sum(), "−": small["removed"].sum()}
        words = [f"{sign}{count}" for sign, count in marks.items() if count] + words
        if words:
            parts.append(f"{table} {' '.join(words)}")
    return ", ".join(parts) or "nothing"
