"""`datakit run score`: fill columns of clips that are in the catalog already.

The same stages over the same grid frames as at ingest give the same numbers; a clip is looked at only for
stages it has not been through at their present fingerprint.
"""

from __future__ import annotations

import os
from typing import Callable, Iterator, Sequence

import polars as pl

from catalogs.tables import Catalog, polars_schema
from datakit.errors import ConfigError
from datakit.video.address import is_remote, local_path
from pipelines.isolate import ToolSpec
from pipelines.jobs import ClipSpan, ScoreJob
from pipelines.runner import Flow, Outcome, StagePool
from pipelines.runs import RunRecord
from pipelines.session import RaySession
from pipelines.settings import Settings
from pipelines.stages import STAGES, enabled_stages, fingerprint, missing_requirements, options_of

CLIPS_A_COMMIT = 5000
KEY = ("clip_id", "run_id", "shard")
FACTS = ("width", "height", "crop_x", "crop_y", "crop_width", "crop_height")
"""Columns that image stages look at."""


def score(
    root: str, settings: Settings = Settings(), stages: list[str] | None = None, where: str | None = None,
    redo: bool = False, ray: str = "local", on_progress: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, object]:
    """Score a catalog's clips.

    Args:
        stages: names; None: all that are enabled.
        where: SQL over the view `clips`; None: all clips.
        redo: also clips that have been through the stages.
        on_progress: called with videos done and videos in all.

    Returns:
        counts: clips scored, clips with errors.

    Raises:
        ConfigError: unknown stage or column, missing requirement.
        CatalogError: no catalog there.
    """
    names = scorable(stages, settings)
    catalog = Catalog(root)
    condition = parse_where(where, catalog)
    session = RaySession(ray)
    record = RunRecord(catalog, "score", {**settings.model_dump(), "stages": names, "where": where}).begin()
    try:
        with session:
            counts: dict[str, object] = {}
            record.spend(fill(session, catalog, settings, names, condition, redo, on_progress, counts))
        record.end("finished", counts)
    except BaseException as e:
        record.end("stopped" if isinstance(e, KeyboardInterrupt) else "failed", {"error": (str(e) or type(e).__name__)[:500]})
        raise
    return {**counts, "stage_cpu_s": record.stage_cpu_s}


def scorable(stages: list[str] | None, settings: Settings) -> list[str]:
    """Stage names that can be run on existing clips.

    Raises:
        ConfigError: unknown, or lacking what they need.
    """
    known = [name for name in STAGES if name != "shots"]
    names = stages if stages is not None else [n for n in enabled_stages(settings) if n != "shots"]
    for name in names:
        if name not in known:
            raise ConfigError(f"no stage {name!r} to score with: there are {', '.join(known)}")
    missing = [line for name in names for line in missing_requirements(name, settings)]
    if missing:
        raise ConfigError("cannot start: " + "; ".join(missing))
    return names


def parse_where(where: str | None, catalog: Catalog) -> pl.Expr:
    """A SQL condition over the view as an expression.

    Raises:
        ConfigError: it cannot be read, or names an unknown column.
    """
    if where is None:
        return pl.lit(True)
    try:
        condition = pl.sql_expr(where)
    except pl.exceptions.PolarsError as e:
        raise ConfigError(f"--where cannot be read: {e}") from e
    unknown = sorted(set(condition.meta.root_names()) - set(catalog.view_columns()))
    if unknown:
        raise ConfigError(f"--where: no column {', '.join(unknown)} (see `datakit catalog show`)")
    return condition


def fill(
    session: RaySession, catalog: Catalog, settings: Settings, names: list[str], condition: pl.Expr, redo: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, of: None, counts: dict[str, object] | None = None,
) -> dict[str, float]:
    """Run stages over the clips that match and have not been through them.

    Returns:
        CPU seconds by stage.
    """
    fingerprints = {name: fingerprint(name, settings) for name in names}
    todo = _todo(catalog, fingerprints, condition, redo)
    cpu_s: dict[str, float] = {}
    counts = counts if counts is not None else {}
    counts.update(clips=todo.height, videos=todo["video_id"].n_unique() if todo.height else 0, clips_with_errors=0)
    if not todo.height:
        return cpu_s
    flow = make_flow(session, ToolSpec("pipelines.score_pass:rescore"), settings, names)
    columns = [c for name in names for c in STAGES[name].columns]
    pending: list[dict] = []
    failed: list[dict] = []
    done = 0
    clips_of: dict[str, list[dict]] = {key[0]: group.to_dicts() for key, group in todo.group_by("video_id")}
    try:
        for outcome in flow.run(_jobs(clips_of, names, settings)):
            if outcome is None:
                continue
            done += 1
            for stage, seconds in outcome.cpu_s.items():
                cpu_s[stage] = cpu_s.get(stage, 0.0) + seconds
            clips = clips_of.pop(outcome.key)
            if outcome.failure is None:
                pending += scored_rows(outcome, clips, columns)
            else:
                failed += failed_rows(outcome, clips, names[0])
            on_progress(done, counts["videos"])
            if len(pending) >= CLIPS_A_COMMIT:
                write_columns(catalog, pending, fingerprints)
                counts["clips_with_errors"] += sum(1 for row in pending if row["errors"])
                pending = []
    finally:
        flow.close()
        write_columns(catalog, pending, fingerprints)
        write_errors(catalog, failed, names)
        counts["clips_with_errors"] += len(failed) + sum(1 for row in pending if row["errors"])
    return cpu_s


def scored_rows(outcome: Outcome, clips: list[dict], columns: Sequence[str]) -> list[dict]:
    """What came back of a video's clips, as rows for `write_columns`."""
    by_id = {row["clip_id"]: row for row in outcome.rows}
    rows = []
    for clip in clips:
        row = by_id[clip["clip_id"]]
        values = {name: row.get(name) for name in columns}
        rows.append({**{name: clip[name] for name in KEY}, "errors": row["errors"], **values})
    return rows


def failed_rows(outcome: Outcome, clips: list[dict], stage: str) -> list[dict]:
    """A video that could not be processed is an error on each of its clips: rows for `write_errors`."""
    errors = [{"stage": stage, "kind": str(outcome.failure.kind), "message": outcome.failure.message}]
    return [{**{name: clip[name] for name in KEY}, "errors": errors} for clip in clips]


def write_errors(catalog: Catalog, rows: list[dict], stages: Sequence[str]) -> None:
    """Merge errors of these stages into `clips`. What the clips' columns held before stays, and the stages
    count as not done: the next run tries again."""
    write_columns(catalog, rows, dict.fromkeys(stages))


def write_columns(catalog: Catalog, rows: list[dict], fingerprints: dict[str, str | None]) -> None:
    """Merge filled columns into `clips`, shard by shard.

    Other writers may fill other columns of the same clips meanwhile: the lists of stage versions and of
    errors are made anew from the version that is merged into.

    Args:
        rows: clip_id, run_id, shard, errors (of these stages only) and the filled columns.
        fingerprints: stage -> fingerprint, of the stages that filled them; None: not done.
    """
    if not rows:
        return
    types = {name: kind for name, kind in polars_schema("clips").items() if name in rows[0]}
    filled = [name for name in types if name not in (*KEY, "errors")]
    updates = {name: f"s.{name}" for name in (*filled, "stage_versions", "errors")}
    for (shard,), group in pl.DataFrame(rows, schema=types).group_by("shard"):
        how = {"on": f"t.shard = '{shard}' AND t.clip_id = s.clip_id AND t.run_id = s.run_id", "set": updates}
        catalog.update("clips", lambda table: (_with_lists(group, table, shard, fingerprints), how))


def _with_lists(
    rows: pl.DataFrame, table: pl.LazyFrame, shard: str, fingerprints: dict[str, str | None]
) -> pl.DataFrame:
    """The rows with their new lists of stage versions and errors, made from those in the table."""
    old = table.filter(pl.col("shard") == shard).select("clip_id", "run_id", "stage_versions", "errors").collect()
    joined = rows.rename({"errors": "new_errors"}).join(old, on=["clip_id", "run_id"])
    versions = [_merged(v or [], fingerprints) for v in joined["stage_versions"].to_list()]
    errors = [
        [e for e in before or [] if e["stage"] not in fingerprints and e not in new] + new
        for before, new in zip(joined["errors"].to_list(), (e or [] for e in joined["new_errors"].to_list()))
    ]
    types = polars_schema("clips")
    return joined.drop("new_errors").with_columns(
        pl.Series("stage_versions", versions, dtype=types["stage_versions"]), pl.Series("errors", errors, dtype=types["errors"])
    )


def present(addresses: list[dict]) -> dict:
    """The first of a video's addresses where there is a file (or an object, which is not asked); else the first.

    A video whose addresses all hold other content now has none left.
    """
    candidates = addresses or [{"uri": "no address that is left", "size": None}]
    return next((a for a in candidates if is_remote(a["uri"]) or os.path.exists(local_path(a["uri"]))), candidates[0])


def make_flow(session: RaySession, tool: ToolSpec, settings: Settings, names: list[str]) -> Flow:
    """A flow whose videos go through `tool` and whose clips go through the image stages among `names`."""
    limits = worker_limits(settings, tool.target)
    return Flow(
        session, limits, image_pools(names, settings), settings.runner.workers, settings.runner.attempts, settings.runner.threads
    )


def worker_limits(settings: Settings, target: str = "", options: dict | None = None, gpu: bool = False) -> ToolSpec:
    memory = None if gpu else int(settings.runner.memory_gb * (1 << 30))
    return ToolSpec(target, options or {}, memory, settings.runner.stall_s)


def image_pools(names: list[str], settings: Settings) -> list[StagePool]:
    pools = []
    for name in names:
        info = STAGES[name]
        if info.needs == "images":
            section = getattr(settings, name)
            options = {k: getattr(section, k) for k in (*info.options, *info.runtime_options)}
            spec = worker_limits(settings, info.target, options, gpu=section.num_gpus > 0)
            pools.append(StagePool(name, spec, info.columns, section.num_cpus, section.num_gpus, section.workers))
    return pools


def grid_stages(names: list[str], settings: Settings) -> dict[str, dict]:
    return {name: options_of(name, settings) for name in names if STAGES[name].needs == "grid"}


def wanted_positions(names: list[str], settings: Settings) -> tuple[float, ...]:
    return settings.images.positions if any(STAGES[name].needs == "images" for name in names) else ()


def _todo(catalog: Catalog, fingerprints: dict[str, str], condition: pl.Expr, redo: bool) -> pl.DataFrame:
    """The clips to score, with what their jobs need."""
    clips = catalog.clips().filter(condition)
    if not redo:
        done = pl.lit(True)
        for name, mark in fingerprints.items():
            entry = (pl.element().struct.field("stage") == name) & (pl.element().struct.field("fingerprint") == mark)
            done = done & pl.col("stage_versions").list.eval(entry).list.any().fill_null(False)
        clips = clips.filter(~done)
    videos = catalog.scan("videos").select("video_id", "uris", pl.col("start_pts").alias("first_pts"))
    return clips.select(
        "clip_id", "run_id", "video_id", "shard", "stream", "start_pts", "end_pts", *FACTS
    ).join(videos, on="video_id").sort("video_id", "start_pts").collect()


def _jobs(clips_of: dict[str, list[dict]], names: list[str], settings: Settings) -> Iterator:
    for video_id, clips in list(clips_of.items()):
        address = present(clips[0]["uris"])
        job = ScoreJob(
            video_id=video_id, uri=address["uri"], size=address["size"],
            stream=clips[0]["stream"], first_pts=clips[0]["first_pts"],
            clips=tuple(ClipSpan(c["clip_id"], c["start_pts"], c["end_pts"], {k: c[k] for k in FACTS}) for c in clips),
            stages=grid_stages(names, settings), jitter="jitter" in names, positions=wanted_positions(names, settings),
        )
        yield video_id, lambda threads, job=job: job


def _merged(versions: list[dict], fingerprints: dict[str, str | None]) -> list[dict]:
    """The list of stage versions with these stages', where they are done."""
    if None in fingerprints.values():
        return versions
    kept = [v for v in versions if v["stage"] not in fingerprints]
    return kept + [{"stage": name, "fingerprint": mark} for name, mark in fingerprints.items()]
