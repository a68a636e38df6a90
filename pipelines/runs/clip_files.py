"""`--clips cut|copy`: kept clips become files, each written once."""

from __future__ import annotations

from collections.abc import Iterator

import polars as pl

from catalogs.tables.catalog import Catalog
from datakit.hashing import hash_hex
from datakit.process.messages import ToolSpec
from datakit.source import present
from pipelines.catalog_sync.score_writer import failed_rows, scored_rows, write_columns, write_errors
from pipelines.executor.flow import add_up
from pipelines.executor.flow_setup import make_flow
from pipelines.executor.session import RaySession
from pipelines.settings import Settings
from pipelines.video_tasks.messages import ClipSpan, FileJob

VERSION = "1"
COLUMNS = ("path", "lost_start", "lost_end")
CLIPS_A_COMMIT = 1000


def write_clips(
    session: RaySession, catalog: Catalog, settings: Settings, mode: str, retry_failed: bool = False
) -> dict[str, float]:
    """Write the kept clips that have no file of this mode yet.

    Args:
        mode: `cut` or `copy`.
        retry_failed: also those that are quarantined because they could not be written.

    Returns:
        CPU seconds by stage.
    """
    mark = hash_hex(f"clips/{VERSION}/{mode}", 8)
    todo = _todo(catalog, mark, retry_failed)
    cpu_s: dict[str, float] = {}
    if not todo.height:
        return cpu_s
    clips_of = {key[0]: group.to_dicts() for key, group in todo.group_by("video_id")}
    flow = make_flow(session, ToolSpec("pipelines.video_tasks.cut:materialise"), settings, [])
    pending: list[dict] = []
    failed: list[dict] = []
    try:
        for outcome in flow.run(_jobs(clips_of, catalog.root, mode)):
            if outcome is None:
                continue
            add_up(cpu_s, outcome.cpu_s)
            clips = clips_of[outcome.key]
            if outcome.failure is None:
                pending += scored_rows(outcome, clips, COLUMNS)
            else:
                failed += failed_rows(outcome, clips, "clips")
            if len(pending) >= CLIPS_A_COMMIT:
                write_columns(catalog, pending, {"clips": mark})
                pending = []
    finally:
        flow.close()
        write_columns(catalog, pending, {"clips": mark})
        write_errors(catalog, failed, ["clips"])
    return cpu_s


def file_counts(catalog: Catalog) -> dict[str, int]:
    """Kept clips with a file, frames that stream copies lost at their ends, kept clips without a file."""
    lost = pl.col("lost_start").fill_null(0) + pl.col("lost_end").fill_null(0)
    counted = (
        catalog.clips()
        .filter((pl.col("status") == "kept") & (pl.col("kind") == "video"))
        .select(files=pl.col("path").count(), lost_frames=lost.sum(), without=pl.col("path").null_count())
    )
    return counted.collect().row(0, named=True)


def _todo(catalog: Catalog, mark: str, retry_failed: bool) -> pl.DataFrame:
    stage_is_clips = pl.element().struct.field("stage") == "clips"
    written = (
        pl.col("stage_versions")
        .list.eval(stage_is_clips & (pl.element().struct.field("fingerprint") == mark))
        .list.any()
    )
    todo = (pl.col("status") == "kept") & ~written.fill_null(False)
    if retry_failed:
        only_that = pl.col("errors").list.eval(stage_is_clips).list.all()
        todo = todo | ((pl.col("status") == "quarantined") & only_that.fill_null(False))
    clips = catalog.clips().filter((pl.col("kind") == "video") & todo)
    return (
        clips.select("clip_id", "run_id", "video_id", "shard", "stream", "start_pts", "end_pts")
        .join(catalog.scan("videos").select("video_id", "uris"), on="video_id")
        .sort("video_id", "start_pts")
        .collect()
    )


def _jobs(clips_of: dict[str, list[dict]], root: str, mode: str) -> Iterator:
    for video_id, clips in clips_of.items():
        spans = tuple(ClipSpan(c["clip_id"], c["start_pts"], c["end_pts"]) for c in clips)
        address = present(clips[0]["uris"])
        job = FileJob(video_id, address["uri"], address["size"], clips[0]["stream"], spans, root, mode)
        yield video_id, lambda threads, job=job: job
