"""All that a catalog knows about one clip, read by its id and shard: a few files of each table."""

from __future__ import annotations

import json
import math
from datetime import datetime
from typing import Any

import polars as pl

from catalogs.browse.clip_index import Index
from catalogs.tables.catalog import Catalog
from catalogs.tables.schema import VIEW_FROM_VIDEOS

MOST_SIBLINGS = 2000
MOST_ALIKE = 60
HEAVY = ("cuts",)
"""Columns of a video that nobody reads."""


def record(index: Index, row: int) -> dict[str, Any]:
    """The parts of the side panel, as JSON takes them.

    `clip`: the view's columns; `video`; `siblings`: clips of the video by start; `captions`; `decision`; `marks`, the
        newest
    first; `alike`: clips of its duplicate group; `runs` that made what is here; `losses` by run.
    """
    catalog, versions = index.catalog, index.versions
    shown = index.take([row], ["clip_id", "shard", "status", "level", "mark", "comment"]).row(0, named=True)
    at = (pl.col("shard") == shown["shard"]) & (pl.col("clip_id") == shown["clip_id"])
    with catalog.reading():
        clip = _first(catalog.finished_clips(versions).filter(at))
        video = _first(
            catalog.scan("videos", versions["videos"])
            .filter((pl.col("shard") == shown["shard"]) & (pl.col("video_id") == clip["video_id"]))
            .drop(HEAVY)
        )
        captions = (
            catalog.scan("captions", versions["captions"]).filter(at).sort("style", "created_at").collect().to_dicts()
        )
        decision = _first(
            catalog.scan("decisions", versions["decisions"]).filter(pl.col("clip_id") == shown["clip_id"])
        )
        marks = catalog.scan("marks", versions["marks"]).filter(pl.col("clip_id") == shown["clip_id"])
        marks = marks.sort("created_at", "mark_id", descending=True).collect().to_dicts()
        mean = (pl.col("excess").sum() / pl.col("count").sum()).alias("loss")
        losses = (
            catalog.scan("losses", versions["losses"])
            .filter(at)
            .group_by("run_id", "noise_level")
            .agg(mean, pl.col("count").sum())
        )
        losses = losses.sort("run_id", "noise_level").collect().to_dicts()
        alike = _alike(catalog, versions, clip["duplicate_group"])
        runs = _runs(catalog, {clip["run_id"], video["run_id"], *(c["run_id"] for c in captions)})
    chosen = next((c for c in captions if c["caption_id"] == decision.get("caption_id")), {})
    view = {
        **clip,
        **{name: video.get(name) for name in VIEW_FROM_VIDEOS},
        "uri": index.video_at(row)["uri"],
        **shown,
        "reasons": _reasons(decision.get("reasons"), shown),
        "caption": chosen.get("text"),
        "caption_style": chosen.get("style"),
        "caption_model": chosen.get("model"),
        "caption_flags": chosen.get("flags"),
        "loss": _mean(losses),
    }
    parts = {
        "clip": view,
        "video": video,
        "siblings": _siblings(index, row),
        "captions": captions,
        "decision": decision,
        "marks": marks,
        "alike": _with_status(index, alike),
        "runs": runs,
        "losses": losses,
    }
    return plain(parts)


def plain(value: Any) -> Any:
    """A value as JSON takes it: bytes as hex digits, times in ISO 8601, no NaN."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, pl.Series):
        return [plain(v) for v in value.to_list()]
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, datetime):
        return value.isoformat(timespec="seconds")
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


def captions_of(index: Index, clip_ids: list[str]) -> dict[str, str]:
    """The chosen captions of a page of clips, read from their shards.

    The recipe's choice is in `decisions`, a table over all clips; where a clip has one caption only, as most have, it
    is that.
    """
    rows = index.rows_of(clip_ids)
    where = index.take(rows, ["clip_id", "shard"])
    catalog, versions = index.catalog, index.versions
    shards, ids = where["shard"].cast(pl.String).unique().to_list(), where["clip_id"].to_list()
    with catalog.reading():
        found = catalog.scan("captions", versions["captions"]).filter(
            pl.col("shard").is_in(shards) & pl.col("clip_id").is_in(ids)
        )
        texts = found.select("clip_id", "caption_id", "text").collect()
        if texts["clip_id"].n_unique() < texts.height:
            chosen = (
                catalog.scan("decisions", versions["decisions"])
                .filter(pl.col("clip_id").is_in(ids))
                .select("caption_id")
                .collect()
            )
            texts = texts.filter(pl.col("caption_id").is_in(chosen["caption_id"].implode()))
    return dict(texts.filter(pl.col("text").is_not_null()).select("clip_id", "text").iter_rows())


def _first(rows: pl.LazyFrame) -> dict[str, Any]:
    found = rows.head(1).collect()
    return found.row(0, named=True) if found.height else {}


def _reasons(ruled: list[str] | None, shown: dict) -> list[str]:
    if shown["mark"] is None or shown["status"] == "quarantined":
        return ruled or []
    return [] if shown["mark"] == "keep" else ["mark"]


def _siblings(index: Index, row: int) -> list[dict]:
    rows = index.siblings(row)[:MOST_SIBLINGS]
    return index.take(rows, ["clip_id", "start_s", "end_s", "status"]).to_dicts()


def _alike(catalog: Catalog, versions: dict[str, int], group: str | None) -> list[dict]:
    if group is None:
        return []
    rows = catalog.finished_clips(versions).filter(pl.col("duplicate_group") == group)
    return (
        rows.select("clip_id", "duplicate_of", "duplicate_kind", "duplicate_similarity")
        .head(MOST_ALIKE)
        .collect()
        .to_dicts()
    )


def _with_status(index: Index, clips: list[dict]) -> list[dict]:
    """Clips with their status, in the given order."""
    if not clips:
        return []
    known = index.take(index.rows_of([c["clip_id"] for c in clips]), ["clip_id", "status", "duration"]).to_dicts()
    by_id = {c["clip_id"]: c for c in known}
    return [{**c, **by_id[c["clip_id"]]} for c in clips]


def _runs(catalog: Catalog, run_ids: set[str | None]) -> list[dict]:
    wanted = [run for run in run_ids if run]
    rows = catalog.scan("runs").filter(pl.col("run_id").is_in(wanted)).sort("started_at")
    columns = ("run_id", "pipeline", "author", "status", "started_at", "finished_at", "code_version", "config")
    found = rows.select(columns).collect().to_dicts()
    return [{**run, "config": json.loads(run["config"] or "{}")} for run in found]


def _mean(losses: list[dict]) -> float | None:
    count = sum(entry["count"] for entry in losses)
    return sum(entry["loss"] * entry["count"] for entry in losses) / count if count else None
