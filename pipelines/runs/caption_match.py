"""`caption_match`: how well each clip's caption fits its frames, from the stored embedding and the text tower of
the same CLIP."""

from __future__ import annotations

from collections.abc import Iterator

import polars as pl

from catalogs.tables.catalog import Catalog
from datakit.hashing import hash_hex
from datakit.process.messages import ToolSpec
from pipelines.catalog_sync.embeddings import embedded, mark_of
from pipelines.catalog_sync.score_writer import failed_rows, scored_rows, write_columns, write_errors
from pipelines.executor.flow import Flow, StagePool, add_up
from pipelines.executor.flow_setup import ROWS_ONLY, gpus_of
from pipelines.executor.session import RaySession
from pipelines.settings import Settings
from pipelines.stages.registry import STAGES, fingerprint
from pipelines.video_tasks.passthrough import RowJob

STAGE = "caption_match"
CAPTIONS_A_JOB = 256


def fill_caption_match(
    session: RaySession, catalog: Catalog, settings: Settings, condition: pl.Expr, redo: bool = False
) -> tuple[int, dict[str, float]]:
    """Compare captions with embeddings, where one of the two is new.

    Returns:
        clips compared, CPU seconds by stage.
    """
    pool = _pool(settings, session.gpus())
    flow = Flow(session, ROWS_ONLY, [pool], workers=1)
    compared, cpu_s = 0, {}
    clips_of: dict[str, list[dict]] = {}
    try:
        for outcome in flow.run(_jobs(catalog, settings, condition, redo, clips_of)):
            if outcome is None:
                continue
            clips = clips_of.pop(outcome.key)
            add_up(cpu_s, outcome.cpu_s)
            if outcome.failure is not None:
                write_errors(catalog, failed_rows(outcome, clips, STAGE), [STAGE])
                continue
            marks = {clip["clip_id"]: clip["mark"] for clip in clips}
            rows = [{**row, "mark": marks[row["clip_id"]]} for row in scored_rows(outcome, clips, (STAGE,))]
            write_columns(catalog, rows, {STAGE: ""})
            compared += len(rows)
    finally:
        flow.close()
    return compared, cpu_s


def _pool(settings: Settings, gpus: float) -> StagePool:
    embed, own = settings.embed, settings.caption_match
    options = {
        "model": embed.model,
        "weights": embed.weights,
        "precision": embed.precision,
        "threads": own.threads,
        "batch": embed.batch,
    }
    num_gpus = gpus_of(own.num_gpus, gpus)
    spec = ToolSpec(STAGES[STAGE].target(), options, None, settings.runner.stall_s, threads=own.threads)
    return StagePool(STAGE, spec, (STAGE,), own.num_cpus, num_gpus, own.workers, pictures=False, threads=own.threads)


def _jobs(
    catalog: Catalog, settings: Settings, condition: pl.Expr, redo: bool, clips_of: dict[str, list[dict]]
) -> Iterator:
    own = fingerprint(STAGE, settings)
    captioned = condition & pl.col("caption").is_not_null()
    for shard in embedded(catalog, settings, captioned, "caption", mark_of(STAGE).alias("before")):
        clips = [{**clip, "mark": _mark(own, clip["caption"])} for clip in shard.to_dicts()]
        clips = [clip for clip in clips if redo or clip["mark"] != clip["before"]]
        for start in range(0, len(clips), CAPTIONS_A_JOB):
            part = clips[start : start + CAPTIONS_A_JOB]
            key = f"{part[0]['clip_id']}"
            clips_of[key] = part
            rows = tuple({name: clip[name] for name in ("clip_id", "caption", "vector", "norm")} for clip in part)
            yield key, lambda threads, rows=rows: RowJob(rows)


def _mark(own: str, caption: str) -> str:
    """What a clip's number was made from: another caption gives another mark."""
    return f"{own}.{hash_hex(caption, 6)}"
