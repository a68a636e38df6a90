"""`datakit run ingest`: from sources to decided clips.

Read as a recipe: list sources → identify and register → one pass per video → image stages → commit →
sweep → decide. Everything but the listing and the commits runs on Ray. This module is light to import;
`pipelines.runs.ingest_run` is the run itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from datakit.errors import ConfigError
from pipelines.executor.session import RaySession
from pipelines.runs.report import Progress, Report
from pipelines.settings import Settings
from pipelines.sources import check
from pipelines.stages.registry import enabled_stages, missing_requirements

if TYPE_CHECKING:
    from pipelines.runs.ingest_run import IngestRun


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
    session = RaySession(ray, leave_ray)
    with ThreadPoolExecutor(3) as background:
        # Tables and recipes take a second to import; meanwhile Ray takes five to start.
        preparing = background.submit(_prepare, background, specs, catalog, settings, retry_failed, limit, on_progress)
        try:
            with session:
                preparing.result().process(session)
            return preparing.result().conclude()
        except BaseException as e:
            if preparing.exception() is None:
                preparing.result().give_up(e)
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
    if {"embed", "aesthetic", "caption_match"} & set(names):  # imported when needed: this module is light
        from pipelines.catalog_sync.embeddings import resolve

        settings = resolve(settings, names)
    for pipeline in ("caption", "refine"):
        if getattr(settings, pipeline).enabled:
            from pipelines.runs.caption import check_captioning

            check_captioning(settings, pipeline)
    if settings.dedup.enabled:
        from pipelines.runs.dedup import check_library

        check_library(settings)
    return settings


def _prepare(background: ThreadPoolExecutor, *arguments) -> IngestRun:
    from pipelines.runs.ingest_run import IngestRun

    run = IngestRun(*arguments)
    run.start(background)
    return run
