"""`datakit run ingest`: from sources to decided clips.

Read as a recipe: list sources → identify and register → one pass per video → image stages → commit →
sweep → decide. Everything but the listing and the commits runs on Ray.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from functools import partial
from itertools import islice

import polars as pl

from catalogs.query.funnel import funnel
from catalogs.records.runs import RunRecord
from catalogs.records.video_registry import Video
from catalogs.tables.catalog import Catalog
from datakit.errors import ConfigError, MediaError
from datakit.process.messages import ToolSpec
from pipelines.catalog_sync.embeddings import derived, fill_from_embeddings, resolve
from pipelines.catalog_sync.video_ledger import Ledger, VideoTask
from pipelines.executor.flow import Outcome
from pipelines.executor.flow_setup import grid_stages, image_positions, make_flow, worker_limits
from pipelines.executor.session import RaySession
from pipelines.recipes.decide import decide
from pipelines.recipes.recipe import Recipe, load_recipe
from pipelines.runs.clip_files import file_counts, write_clips
from pipelines.runs.report import Progress, Report
from pipelines.runs.score import fill
from pipelines.settings import Settings
from pipelines.shots.options import DetectorOptions
from pipelines.sources import Listing, Source, check, sources
from pipelines.stages.registry import STAGES, enabled_stages, missing_requirements, on_embeddings
from pipelines.video_tasks.messages import Advance, PassJob

WAVE = 1000
WAVE_S = 2.0
"""Sources are registered in waves of this many, or of what arrives in this many seconds."""
MOST_VIDEOS_A_COMMIT = 2000
SMALL_FILES = 200
"""A table of more files than this is compacted at the end of a run."""


def ingest(
    specs: Sequence[str],
    catalog: str,
    settings: Settings = Settings(),
    ray: str = "local",
    retry_failed: bool = False,
    limit: int | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    leave_ray: bool = False,
) -> Report:
    """Bring sources into a catalog, which is made if there is none.

    Args:
        specs: see `pipelines.sources.sources`.
        catalog: folder or object store URL.
        ray: `local`, `auto` or an address.
        retry_failed: do quarantined videos again.
        limit: at most this many sources.
        on_progress: called often from this thread.
        leave_ray: leave a local Ray running; for a process that exits next.

    Raises:
        ConfigError: before anything starts, when the run could not work.
        CatalogError: when the catalog cannot be written, or its accounts do not add up.
    """
    check(specs)
    settings = prepared(settings)
    recipe = checked_recipe(settings)
    session = RaySession(ray, leave_ray)
    with ThreadPoolExecutor(3) as background:
        run = IngestRun(specs, catalog, settings, recipe, retry_failed, limit, on_progress)
        run.start(background)  # sources are listed and registered while Ray starts
        try:
            with session:
                run.process(session)
            return run.conclude()
        except BaseException as e:
            run.give_up(e)
            raise


def prepared(settings: Settings) -> Settings:
    """The settings, seen to work here, with the weights found that they need.

    Raises:
        ConfigError: a stage lacks a library or its weights.
    """
    names = enabled_stages(settings)
    missing = [line for name in names for line in missing_requirements(name, settings)]
    if missing:
        raise ConfigError("cannot start: " + "; ".join(missing))
    settings = resolve(settings, names)
    for pipeline in ("caption", "refine"):
        if getattr(settings, pipeline).enabled:
            from pipelines.runs.caption import check_captioning  # imported when asked for: most ingests do without

            check_captioning(settings, pipeline)
    if settings.dedup.enabled:
        from pipelines.runs.dedup import check_library

        check_library(settings)
    return settings


def checked_recipe(settings: Settings) -> Recipe:
    """The recipe of a run.

    Raises:
        ConfigError: it cannot be read, or needs a stage that is switched off.
    """
    recipe = load_recipe(settings.recipe)
    waiting = recipe.waits_for(set(enabled_stages(settings)))
    switched_off = {
        r: s for r, s in waiting.items() if s in STAGES and s not in derived(STAGES)
    }  # those may come later
    if switched_off:
        rule, stage = next(iter(switched_off.items()))
        raise ConfigError(
            f"recipe {recipe.name}, rule {rule} needs stage {stage}, which is off: --set {stage}.enabled=true, or "
            f"another --recipe"
        )
    return recipe


class IngestRun:
    """What happens between Ray's start and the report."""

    def __init__(
        self,
        specs: Sequence[str],
        root: str,
        settings: Settings,
        recipe: Recipe,
        retry_failed: bool,
        limit: int | None,
        on_progress: Callable[[Progress], None],
    ):
        self.specs, self.root, self.settings, self.recipe = specs, root, settings, recipe
        self.retry_failed, self.limit, self.on_progress = retry_failed, limit, on_progress
        self.progress = Progress()
        self.listing = Listing()
        self._tasks: queue.SimpleQueue[VideoTask | BaseException | None] = queue.SimpleQueue()
        self._finished: list[Video] = []
        self._sizes: dict[str, int] = {}  # of videos under way
        self._bytes_of_finished = 0
        self._stop = threading.Event()
        self._committed_at = 0.0

    def start(self, background: Executor) -> None:
        """Begin to list and register; goes on in the background while Ray starts."""
        self._background = background
        self._scanning = background.submit(self._scan)

    def process(self, session: RaySession) -> None:
        """All the work that needs Ray. What is left to do goes on while Ray shuts down."""
        self._analyse(session)
        self._scanning.result()
        self._fill_gaps(session)
        self._deciding = self._background.submit(self._decide)
        if any(getattr(self.settings, name).enabled for name in ("caption", "refine", "caption_match", "dedup")):
            self._deciding.result()
            self._describe(session)
        if self.settings.clips != "virtual":
            self._deciding.result()
            self._write_clips(session)

    def _describe(self, session: RaySession) -> None:
        """What is worth doing for kept and pending clips only: captions, and then the duplicates."""
        from pipelines.runs.caption import fill_captions
        from pipelines.runs.caption_match import fill_caption_match
        from pipelines.runs.dedup import mark_duplicates

        status = pl.col("status").is_in(["kept", "pending"])
        for pipeline in ("caption", "refine"):
            if getattr(self.settings, pipeline).enabled:
                self._show_phase("captioning")
                told = fill_captions(
                    session, self.catalog, self.settings, pipeline, status, self.record.run_id, self.retry_failed
                )
                self.record.spend(told.stage_cpu_s)
                decide(self.catalog, self.recipe)  # chooses the captions
        if self.settings.caption_match.enabled:
            self._show_phase("comparing captions")
            self.record.spend(fill_caption_match(session, self.catalog, self.settings, status)[1])
        if self.settings.dedup.enabled:
            self._show_phase("finding duplicates")
            mark_duplicates(self.catalog, self.settings)
        decide(self.catalog, self.recipe)

    def _show_phase(self, name: str) -> None:
        self.progress.phase = name
        self.on_progress(self.progress)

    def conclude(self) -> Report:
        """Count, and complete the `runs` row.

        Raises:
            CatalogError: when the accounts do not add up.
        """
        self._deciding.result()
        for name in ("clips", "videos", "embeddings"):
            if len(self.catalog.table(name).file_uris()) > SMALL_FILES:
                self.catalog.compact(name)
        counted = funnel(self.catalog)
        counts = asdict(self.ledger.counts)
        self.record.end("finished", {"funnel": counted.as_dict(), "run": counts})
        wall = time.monotonic() - self.record.started
        files = file_counts(self.catalog) if self.settings.clips != "virtual" else None
        return Report(self.record.run_id, counted, counts, self.listing.ignored, self.record.stage_cpu_s, wall, files)

    def give_up(self, error: BaseException) -> None:
        """Stop listing and leave a truthful `runs` row behind; what was committed stays."""
        self._stop.set()
        wait([self._scanning])
        if hasattr(self, "record"):
            self.record.fail(error)

    def _scan(self) -> None:
        """List, identify and register; the end of the queue is None or what went wrong."""
        try:
            self.catalog = Catalog.create(self.root, self.settings.catalog.shard_digits)
            self.record = RunRecord(
                self.catalog,
                "ingest",
                {
                    **self.settings.model_dump(),
                    "sources": list(self.specs),
                    "recipe_rules": self.recipe.file.model_dump(),
                },
            ).begin()
            self.ledger = Ledger(self.catalog, self.record.run_id, self.settings, self.retry_failed)
            for wave in waves(islice(sources(self.specs, self.listing), self.limit)):
                if self._stop.is_set():
                    return
                for task in self.ledger.register(wave):
                    self.progress.bytes += task.size
                    self._tasks.put(task)
                self.progress.found, self.progress.registered = self.listing.found, self.ledger.counts.registered
            self.progress.listing = False
            self._tasks.put(None)
        except BaseException as e:
            self._tasks.put(e)
            raise

    def _analyse(self, session: RaySession) -> None:
        flow = make_flow(
            session, ToolSpec("pipelines.video_tasks.analyse:analyse"), self.settings, enabled_stages(self.settings)
        )
        flow.on_progress = self._show_running
        commit: Future | None = None
        try:
            for outcome in flow.run(self._jobs()):
                if outcome is not None:
                    self._take(outcome)
                if commit is not None and commit.done():
                    commit.result()
                    commit = None
                if commit is None and self._commit_is_due():
                    commit = self._background.submit(self._commit)
                self.on_progress(self.progress)
        finally:
            if commit is not None:
                commit.result()
            if self._finished:
                self._commit()
            flow.close()

    def _jobs(self) -> Iterator[tuple[str, Callable[[int], PassJob]] | None]:
        while True:
            try:
                task = self._tasks.get(timeout=0.0 if self.progress.registered else 0.05)
            except queue.Empty:
                yield None
                continue
            if task is None:
                return
            if isinstance(task, BaseException):
                raise task
            self._sizes[task.video_id] = task.size
            yield task.video_id, partial(self._job, task)

    def _job(self, task: VideoTask, threads: int) -> PassJob:
        shots = self.settings.shots
        names = enabled_stages(self.settings)
        return PassJob(
            video_id=task.video_id,
            uri=task.uri,
            shard=task.shard,
            size=task.size,
            detector=DetectorOptions(
                shots.detector, shots.threshold, shots.window, shots.min_content, shots.min_scene_s, shots.final_scene
            ),
            min_s=shots.min_s,
            max_s=shots.max_s,
            trim_frames=shots.trim_frames,
            fade_level=shots.fade_level,
            stages=grid_stages(names, self.settings),
            positions=image_positions(names, self.settings),
            threads=threads,
            limits=worker_limits(self.settings),
        )

    def _take(self, outcome: Outcome) -> None:
        self.record.spend(outcome.cpu_s)
        self.progress.done += 1
        self._bytes_of_finished += self._sizes.pop(outcome.key)
        self.progress.bytes_done = self._bytes_of_finished
        if outcome.failure is None:
            self._finished.append(Video(outcome.key, columns=outcome.facts.columns, clips=outcome.rows))
            self.progress.clips += len(outcome.rows)
            self.progress.video_s += outcome.facts.columns["duration_s"]
        else:
            failure = MediaError(outcome.failure.kind, outcome.failure.message, outcome.failure.stage)
            self._finished.append(Video(outcome.key, failure=failure))
            self.progress.quarantined += 1

    def _commit_is_due(self) -> bool:
        """The first result at once; then large commits, seldom."""
        waiting = time.monotonic() - self._committed_at
        return bool(self._finished) and (
            waiting > self.settings.runner.commit_s or len(self._finished) > MOST_VIDEOS_A_COMMIT
        )

    def _commit(self) -> None:
        batch, self._finished = self._finished, []
        self.ledger.finish(batch)
        self._committed_at = time.monotonic()

    def _show_running(self, running: dict[str, Advance]) -> None:
        self.progress.running_s = sum(advance.seconds for advance in running.values())
        parts = sum(advance.share * self._sizes[video_id] for video_id, advance in running.items())
        self.progress.bytes_done = self._bytes_of_finished + parts

    def _fill_gaps(self, session: RaySession) -> None:
        """Clips of videos that were done before may lack a stage that was not enabled then, has changed or failed;
        and what is made from embeddings is lacking everywhere."""
        self.progress.phase = "scoring"
        names = [n for n in enabled_stages(self.settings) if n not in ("shots", "caption_match")]
        seen = pl.col("video_id").is_in(list(self.ledger.seen))
        for stage in on_embeddings(names):
            fill_from_embeddings(self.catalog, self.settings, stage, seen)
        if self.ledger.counts.done_before:
            self.record.spend(fill(session, self.catalog, self.settings, names, seen).cpu_s)
            if self.retry_failed:
                failed = pl.col("errors").list.eval(pl.element().struct.field("stage").is_in(names)).list.any()
                self.record.spend(fill(session, self.catalog, self.settings, names, seen & failed, redo=True).cpu_s)

    def _decide(self) -> None:
        self.progress.phase = "deciding"
        self.ledger.sweep()
        decide(self.catalog, self.recipe)

    def _write_clips(self, session: RaySession) -> None:
        self._show_phase("writing clips")
        self.record.spend(write_clips(session, self.catalog, self.settings, self.settings.clips, self.retry_failed))
        decide(self.catalog, self.recipe)  # a clip that could not be written is quarantined


def waves(stream: Iterator[Source]) -> Iterator[list[Source]]:
    """Sources in groups: as many as come in `WAVE_S` seconds, at most `WAVE`."""
    wave: list[Source] = []
    began = time.monotonic()
    for source in stream:
        wave.append(source)
        if len(wave) >= WAVE or time.monotonic() - began > WAVE_S:
            yield wave
            wave, began = [], time.monotonic()
    if wave:
        yield wave
