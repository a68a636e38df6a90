"""`datakit run score`: fill columns of clips that are in the catalog already.

The same stages over the same grid frames as at ingest give the same numbers; a clip is looked at only for
stages it has not been through at their present fingerprint.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

import polars as pl

from catalogs.query.where import parse_where
from catalogs.records.runs import RunRecord
from catalogs.tables.catalog import Catalog
from datakit.errors import ConfigError
from datakit.process.messages import ToolSpec
from datakit.source import present
from pipelines.catalog_sync.embeddings import (
    derived,
    done,
    embedding_identity,
    fill_from_embeddings,
    resolve,
)
from pipelines.catalog_sync.score_writer import (
    embedding_rows,
    failed_rows,
    scored_rows,
    write_columns,
    write_embeddings,
    write_errors,
)
from pipelines.executor.flow import Outcome, add_up
from pipelines.executor.flow_setup import grid_stages, image_positions, jobs_of_clips, make_flow
from pipelines.executor.session import RaySession
from pipelines.recipes.decide import redecide
from pipelines.runs.caption_match import fill_caption_match
from pipelines.settings import Settings
from pipelines.stages.registry import STAGES, enabled_stages, fingerprint, missing_requirements, on_embeddings
from pipelines.video_tasks.messages import CLIP_FACTS, ClipSpan, ScoreJob

CLIPS_A_COMMIT = 5000
COMMIT_S = 60.0
"""Results are committed when there are so many, or after so many seconds."""
CLIPS_A_JOB = 64


def score(
    root: str,
    settings: Settings = Settings(),
    stages: list[str] | None = None,
    where: str | None = None,
    redo: bool = False,
    ray: str = "local",
    on_progress: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, object]:
    """Score a catalog's clips.

    Args:
        stages: names; None: all that are enabled.
        where: SQL over the view `clips`; None: all clips, but for `embed` those that are kept or pending.
        redo: also clips that have been through the stages.
        on_progress: called with clips done and clips in all.

    Returns:
        counts: clips scored, clips with errors, clips rated from embeddings; `statuses` after deciding again by
        the recipe in force (None when there is none).

    Raises:
        ConfigError: unknown stage or column, missing requirement.
        CatalogError: no catalog there.
    """
    names = scorable(stages, settings)
    settings = resolve(settings, names)
    catalog = Catalog(root)
    condition = parse_where(where)
    session = RaySession(ray)
    record = RunRecord(catalog, "score", {**settings.model_dump(), "stages": names, "where": where}).begin()
    try:
        with session:
            filled = fill(session, catalog, settings, names, condition, redo, on_progress, everywhere=where is not None)
        record.spend(filled.cpu_s)
        decided = redecide(catalog)
        counts = {name: value for name, value in asdict(filled).items() if name != "cpu_s"} | {"statuses": decided}
        record.end("finished", counts)
    except BaseException as e:
        record.fail(e)
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


@dataclass
class Filled:
    """What a fill did."""

    clips: int = 0
    videos: int = 0
    clips_with_errors: int = 0
    rated: dict[str, int] = field(default_factory=dict)  # stage without pictures -> clips
    cpu_s: dict[str, float] = field(default_factory=dict)


def fill(
    session: RaySession,
    catalog: Catalog,
    settings: Settings,
    names: list[str],
    condition: pl.Expr,
    redo: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, of: None,
    everywhere: bool = False,
) -> Filled:
    """Run stages over the clips that match, each clip through those it has not been through.

    Args:
        settings: with weights found (`embedding.resolve`).
        everywhere: `embed` takes all these clips; else only those that are kept or pending.
    """
    filled = Filled()
    later = derived(names)
    looking = [name for name in names if name not in later]
    todo = _todo(catalog, settings, looking, condition, redo, everywhere)
    filled.clips, filled.videos = todo.height, todo["video_id"].n_unique()
    for (lacking,), clips in todo.group_by("lacking", maintain_order=True):
        stages = [name for name in looking if name in lacking.split()]
        _look(session, catalog, settings, stages, clips, filled, lambda done: on_progress(done, todo.height))
    for stage in on_embeddings(later):
        filled.rated[stage] = fill_from_embeddings(catalog, settings, stage, condition, redo)
    if "caption_match" in later:
        filled.rated["caption_match"], cpu_s = fill_caption_match(session, catalog, settings, condition, redo)
        add_up(filled.cpu_s, cpu_s)
    return filled


def _look(
    session: RaySession,
    catalog: Catalog,
    settings: Settings,
    names: list[str],
    todo: pl.DataFrame,
    filled: Filled,
    on_progress: Callable[[int], None],
) -> None:
    """Run stages that look at pictures over clips; commits now and then."""
    writer = _Writer(catalog, settings, names)
    flow = make_flow(session, ToolSpec("pipelines.video_tasks.rescore:rescore"), settings, names)
    clips_of = jobs_of_clips(todo, CLIPS_A_JOB)
    looked = 0
    try:
        for outcome in flow.run(_jobs(clips_of, names, settings)):
            if outcome is not None:
                add_up(filled.cpu_s, outcome.cpu_s)
                clips = clips_of.pop(outcome.key)
                looked += len(clips)
                filled.clips_with_errors += writer.take(outcome, clips)
                on_progress(looked)
    finally:
        flow.close()
        writer.commit()


class _Writer:
    """Collects results, commits them now and then."""

    def __init__(self, catalog: Catalog, settings: Settings, names: list[str]):
        self._catalog, self._settings, self._names = catalog, settings, names
        self._marks = {name: fingerprint(name, settings) for name in names}
        self._columns = [c for name in names for c in (*STAGES[name].column_names(), *STAGES[name].result)]
        self._rows: list[dict] = []
        self._failed: list[dict] = []
        self._committed_at = time.monotonic()

    def take(self, outcome: Outcome, clips: list[dict]) -> int:
        """Results of some clips of a video; gives how many have errors."""
        rows = []
        if outcome.failure is None:
            rows = scored_rows(outcome, clips, self._columns)
            videos = {clip["clip_id"]: clip["video_id"] for clip in clips}
            self._rows += [{**row, "video_id": videos[row["clip_id"]]} for row in rows]
        else:
            self._failed += failed_rows(outcome, clips, self._names[0])
        if len(self._rows) >= CLIPS_A_COMMIT or time.monotonic() - self._committed_at > COMMIT_S:
            self.commit()
        return sum(1 for row in rows if row["errors"]) if outcome.failure is None else len(clips)

    def commit(self) -> None:
        rows, self._rows = self._rows, []
        failed, self._failed = self._failed, []
        if "embed" in self._names:
            write_embeddings(self._catalog, embedding_rows(rows, *embedding_identity(self._settings)))
        write_columns(self._catalog, [{k: v for k, v in row.items() if k != "video_id"} for row in rows], self._marks)
        write_errors(self._catalog, failed, self._names)
        self._committed_at = time.monotonic()


def _todo(
    catalog: Catalog, settings: Settings, names: list[str], condition: pl.Expr, redo: bool, everywhere: bool
) -> pl.DataFrame:
    """The clips to look at, with what their jobs need; `lacking`: the stages they have not been through."""
    marks = {name: fingerprint(name, settings) for name in names}
    clips = catalog.clips().filter(condition)
    if "embed" in marks:
        embedded = (
            catalog.scan("embeddings")
            .filter(pl.col("fingerprint") == marks["embed"])
            .select("clip_id", "run_id", has=pl.lit(True))
        )
        clips = clips.join(embedded.unique(["clip_id", "run_id"]), on=["clip_id", "run_id"], how="left")
    lacks = {name: pl.lit(True) if redo else ~done(name, mark) for name, mark in marks.items()}
    if "embed" in marks:
        worth = pl.lit(everywhere) | pl.col("status").is_in(["kept", "pending"])
        lacks["embed"] = worth & (pl.lit(redo) | pl.col("has").is_null())
    named = [pl.when(lack).then(pl.lit(f"{name} ")) for name, lack in lacks.items()]
    lacking = pl.concat_str(named, ignore_nulls=True) if named else pl.lit("")
    videos = catalog.scan("videos").select("video_id", "uris", pl.col("start_pts").alias("first_pts"))
    todo = clips.select(
        "clip_id",
        "run_id",
        "video_id",
        "shard",
        "stream",
        "start_pts",
        "end_pts",
        *CLIP_FACTS,
        lacking.alias("lacking"),
    )
    with catalog.reading():
        return (
            todo.filter(pl.col("lacking") != "")
            .join(videos, on="video_id")
            .sort("lacking", "video_id", "start_pts")
            .collect()
        )


def _jobs(clips_of: dict[str, list[dict]], names: list[str], settings: Settings) -> Iterator:
    for key, clips in list(clips_of.items()):
        address = present(clips[0]["uris"])
        job = ScoreJob(
            video_id=clips[0]["video_id"],
            uri=address["uri"],
            size=address["size"],
            stream=clips[0]["stream"],
            first_pts=clips[0]["first_pts"],
            clips=tuple(
                ClipSpan(c["clip_id"], c["start_pts"], c["end_pts"], {k: c[k] for k in CLIP_FACTS}) for c in clips
            ),
            stages=grid_stages(names, settings),
            jitter="jitter" in names,
            positions=image_positions(names, settings),
        )
        yield key, lambda threads, job=job: job
