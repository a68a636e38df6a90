"""What settings say of a flow: its pools of workers, their limits, and what a video worker measures for its stages."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import polars as pl

from datakit.process.messages import ToolSpec
from pipelines.captioning.language_model import is_local
from pipelines.executor.actors import EngineWorker
from pipelines.executor.flow import Flow, StagePool
from pipelines.executor.session import RaySession
from pipelines.settings import LanguageModel, Settings
from pipelines.stages.base import GridStages
from pipelines.stages.registry import STAGES, on_grid
from pipelines.video_tasks.messages import CLIPS_A_BATCH

ROWS_ONLY = ToolSpec("pipelines.video_tasks.passthrough:pass_on")
"""The tool of a flow whose stages look at rows and at no picture."""
SEATS = 2
"""Clips handed to an actor per request that its engine works on: the next ones wait there, not across Ray. With the
tiny VLM of scripts/bench_semantics.py, without Ray, 65 captions/s; 48 with only two more than the engine takes."""


def make_flow(session: RaySession, tool: ToolSpec, settings: Settings, names: list[str]) -> Flow:
    """A flow whose videos go through `tool` and whose clips go through the image stages among `names`."""
    return Flow(
        session,
        worker_limits(settings, tool.target),
        image_pools(names, settings, session.gpus()),
        settings.runner.workers,
        settings.runner.attempts,
        settings.runner.threads,
    )


def worker_limits(
    settings: Settings,
    target: str = "",
    options: dict[str, Any] | None = None,
    unbounded: bool = False,
    threads: int = 1,
) -> ToolSpec:
    """What a child process runs, with the memory (unless `unbounded`) and the time that the settings allow it."""
    memory = None if unbounded else int(settings.runner.memory_gb * (1 << 30))
    return ToolSpec(target, options or {}, memory, settings.runner.stall_s, threads=threads)


def image_pools(names: list[str], settings: Settings, gpus: float) -> list[StagePool]:
    """The actors of the image stages among `names`.

    Args:
        gpus: of the cluster.
    """
    pools = []
    for name in (name for name in names if STAGES[name].needs == "images"):
        stage, section = STAGES[name], getattr(settings, name)
        threads = getattr(section, "threads", 1)
        num_gpus = gpus_of(section.num_gpus, gpus)
        big = num_gpus > 0 or bool(stage.weights)  # a model of any size; the danger lies in decoders
        spec = worker_limits(settings, stage.target(), stage.arguments(section), big, threads)
        columns = (*stage.column_names(), *stage.result)
        pools.append(StagePool(name, spec, columns, section.num_cpus, num_gpus, section.workers, threads=threads))
    return pools


def language_model_pool(
    name: str, spec: ToolSpec, columns: tuple[str, ...], section: LanguageModel, gpus: float, pictures: bool
) -> StagePool:
    """The actors of a stage that asks a language model. An endpoint does the work itself: one actor asks it.

    Args:
        gpus: of the cluster.
        pictures: whether it is shown frames.
    """
    local = is_local(section)
    return StagePool(
        name,
        spec,
        columns,
        section.num_cpus,
        gpus_of(section.num_gpus, gpus, section.tensor_parallel) if local else 0.0,
        section.workers if local else section.workers or 1,
        pictures=pictures,
        slots=slots_of(section),
        worker=EngineWorker,
        threads=section.threads if local else 1,
    )


def slots_of(section: LanguageModel) -> int:
    """Calls, each of a batch of clips, that an actor of a language model takes at once."""
    return max(2, SEATS * section.max_num_seqs // CLIPS_A_BATCH)


def gpus_of(num_gpus: float | None, gpus: float, per_actor: float = 1.0) -> float:
    """GPUs of an actor: as set, else `per_actor` where the cluster has any."""
    if num_gpus is not None:
        return num_gpus
    return float(per_actor) if gpus else 0.0


def grid_stages(names: Iterable[str], settings: Settings) -> GridStages:
    """What makes the grid stages among `names` in the process that decodes, in the order in which a clip's columns are
    made."""
    return {name: partial(stage, **stage.arguments(getattr(settings, name))) for name, stage in on_grid(names).items()}


def image_positions(names: list[str], settings: Settings) -> tuple[float, ...]:
    """Where in a clip the image stages among `names` look; none: no pictures are needed."""
    return settings.images.positions if any(STAGES[name].needs == "images" for name in names) else ()


def jobs_of_clips(todo: pl.DataFrame, most: int) -> dict[str, list[dict[str, Any]]]:
    """The clips of each video in parts of at most so many, so that a long video does not hold everything back until it
    is done. Rows by a key that names video and part."""
    return {
        f"{video_id}.{number}": part.to_dicts()
        for (video_id,), group in todo.group_by("video_id", maintain_order=True)
        for number, part in enumerate(group.iter_slices(most))
    }
