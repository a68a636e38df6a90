"""`datakit run dedup`: which clips repeat others, into the columns `duplicate_*` and `split` of `clips`.

One process, without Ray: no picture is looked at, only columns, about 1 kB a clip and, where there are embeddings,
twice their size (see `pipelines.duplicates.similarity`). It always compares everything anew, which is cheap, and writes
the rows that differ in one commit: readers never see half of a result, a run that was killed is simply started again,
and a second run writes nothing.

A recipe drops what repeats something with the rule

    - name: duplicate
      keep: case when duplicate_group is null then null else duplicate_of is null end
      source: ours; of near-duplicates the best one stays

which leaves clips pending until they were compared. Which clips are compared does not depend on such rules: those
that the rest of the recipe keeps or leaves pending. So a clip that was rejected as a duplicate takes part again.

A group of near-duplicates lies in one split: in train if any of them does, else in val if any does. (A model may
have seen the one in train: moving it out would leak, moving the others in does not.) Splits only ever move that way.
"""

from __future__ import annotations

import importlib.util
import time
from dataclasses import asdict, dataclass, field

import numpy as np
import polars as pl

from catalogs.query.where import parse_where
from catalogs.records.runs import RunRecord
from catalogs.tables.arrow_types import polars_schema
from catalogs.tables.catalog import Catalog
from datakit.dependencies import install_command
from datakit.errors import ConfigError
from pipelines.duplicates.grouping import KINDS, Clips, Duplicates, find_duplicates
from pipelines.duplicates.similarity import threshold_of
from pipelines.recipes.decide import current_recipe, decide, verdicts
from pipelines.settings import Settings

COLUMNS = ("duplicate_group", "duplicate_of", "duplicate_kind", "duplicate_similarity", "split")
KEY = ("clip_id", "run_id", "shard")
SPLITS = ("train", "val", "test")
"""A group is on the side of the first of these that any of its clips is on."""


@dataclass
class Deduplicated:
    """What a run found and did.

    Attributes:
        clips: compared; `of`: in the catalog.
        groups: of more than one clip.
        duplicates: kind -> clips that repeat another.
        hours: of the clips compared; `hours_saved`: of those that repeat another.
        splits_moved: clips that went to another split.
        without_phash: clips that no perceptual hash was made of yet.
        model: whose embeddings were compared (None: none), with `threshold`.
        changed: rows written.
        statuses: clips by status, after deciding again by the recipe in force (None when there is none).
    """

    clips: int = 0
    of: int = 0
    groups: int = 0
    duplicates: dict[str, int] = field(default_factory=dict)
    hours: float = 0.0
    hours_saved: float = 0.0
    splits_moved: int = 0
    without_phash: int = 0
    model: str | None = None
    threshold: float | None = None
    changed: int = 0
    statuses: dict[str, int] | None = None
    wall_s: float = 0.0


def dedup(root: str, settings: Settings = Settings(), where: str | None = None) -> Deduplicated:
    """Find duplicates among a catalog's clips, enter them, and decide again.

    Args:
        where: SQL over the view `clips`: which are compared, the others' columns become null. None: those that the
            recipe in force, its rules on duplicates aside, keeps or leaves pending; without one, all without errors.

    Raises:
        ConfigError: unknown column or model, missing library.
        CatalogError: no catalog there.
    """
    started = time.monotonic()
    catalog = Catalog(root)
    check_library(settings)
    parse_where(where)
    record = RunRecord(catalog, "dedup", {"dedup": settings.dedup.model_dump(), "where": where}).begin()
    try:
        found = mark_duplicates(catalog, settings, where)
        found.statuses = _decide_again(catalog, bool(found.changed))
        found.wall_s = time.monotonic() - started
        record.end("finished", asdict(found))
    except BaseException as e:
        record.fail(e)
        raise
    return found


def mark_duplicates(catalog: Catalog, settings: Settings, where: str | None = None) -> Deduplicated:
    """The same without the row in `runs` and without deciding."""
    check_library(settings)
    clips = _read(catalog, where)
    taking = clips.filter("takes_part")
    found = Deduplicated(taking.height, clips.height)
    duplicates = _compare(catalog, settings, taking, found)
    new = _with_splits(_columns(taking, duplicates))
    _count(found, taking, new)
    out = clips.filter(~pl.col("takes_part")).select(*KEY, *(pl.lit(None).alias(c) for c in COLUMNS[:-1]), "split")
    found.changed = _write(catalog, clips, pl.concat([new, out], how="vertical_relaxed"))
    return found


def check_library(settings: Settings) -> None:
    if (settings.dedup.perceptual or settings.dedup.semantic) and importlib.util.find_spec("faiss") is None:
        raise ConfigError(
            f"dedup needs faiss: {install_command('dedup')} (or only exact copies: --set dedup.perceptual=false "
            "--set dedup.semantic=false)"
        )


def _read(catalog: Catalog, where: str | None) -> pl.DataFrame:
    """All clips with what they are compared and preferred by, in order of preference, and whether they take part.

    The best is the one with most pixels inside black borders, then with the highest bit rate, aesthetic score and
    length.
    """
    pixels = (pl.col("crop_width").cast(pl.Int64) * pl.col("crop_height")).fill_null(pl.col("resolution"))
    length = pl.col("end_s") - pl.col("start_s")
    clips = (
        catalog.clips()
        .join(_participants(catalog, where), on="clip_id", how="left")
        .select(
            *KEY,
            "video_id",
            pixels.alias("pixels"),
            "bit_rate",
            "aesthetic",
            length.alias("seconds"),
            "phash",
            "content_hash",
            *COLUMNS,
            pl.col("takes_part").fill_null(False),
        )
    )
    order = {"pixels": True, "bit_rate": True, "aesthetic": True, "seconds": True, "clip_id": False}
    with catalog.reading():
        return clips.sort(*order, descending=list(order.values()), nulls_last=True).collect()


def _participants(catalog: Catalog, where: str | None) -> pl.LazyFrame:
    """`clip_id` of the clips that are compared, and `takes_part`: true."""
    recipe = None if where is not None else current_recipe(catalog)
    rest = recipe and recipe.without({"dedup"})
    if where is not None:
        chosen = catalog.clips().filter(parse_where(where))
    elif rest is None or not rest.levels[0]:  # no rules, or none but those on duplicates
        chosen = catalog.clips().filter(pl.col("errors").list.len().fill_null(0) == 0)
    else:
        chosen = verdicts(catalog, rest).filter(pl.col("status").is_in(["kept", "pending"]))
    return chosen.select("clip_id", pl.lit(True).alias("takes_part"))


def _compare(catalog: Catalog, settings: Settings, clips: pl.DataFrame, found: Deduplicated) -> Duplicates:
    options = settings.dedup
    found.without_phash = clips["phash"].null_count() if options.perceptual or options.exact else 0
    embedded, vectors = None, None
    if options.semantic:
        found.model, embedded, vectors = _embeddings(catalog, options.model, clips)
    if found.model is not None:
        found.threshold = options.semantic_threshold or threshold_of(found.model)
    return find_duplicates(
        Clips(
            video=clips["video_id"].rank("dense").to_numpy().astype(np.int64),
            content=clips["content_hash"].to_list() if options.exact else None,
            phash=clips["phash"].fill_null(b"").to_list() if options.perceptual else None,
            embedded=embedded,
            vectors=vectors,
        ),
        options.perceptual_radius,
        options.perceptual_share,
        found.threshold or 1.0,
        options.within_video,
    )


def _embeddings(
    catalog: Catalog, model: str | None, clips: pl.DataFrame
) -> tuple[str | None, np.ndarray | None, np.ndarray | None]:
    """The model asked for, or the one that embedded most of these clips; their indices and vectors. None without any.

    Raises:
        ConfigError: nothing was embedded by the model asked for.
    """
    places = clips.lazy().with_row_index("place").select("clip_id", pl.col("place").cast(pl.Int64))
    rows = catalog.embeddings().filter(pl.col("vector").is_not_null()).join(places, on="clip_id")
    counted = rows.group_by("model").len().sort("len", "model", descending=[True, False]).collect()
    models = counted["model"].to_list()
    if model is not None and model not in models:
        raise ConfigError(f"dedup.model: no clip has an embedding of {model}: there are {', '.join(models) or 'none'}")
    if not models:
        return None, None, None
    chosen = model or models[0]
    table = rows.filter(pl.col("model") == chosen).select("place", "vector").sort("place").collect()
    return chosen, table["place"].to_numpy(), table["vector"].explode().to_numpy().reshape(table.height, -1)


def _columns(clips: pl.DataFrame, found: Duplicates) -> pl.DataFrame:
    """The duplicate columns of the clips compared, and `split` as it was."""
    ids = clips["clip_id"].to_list()
    types = polars_schema("clips")
    return clips.with_columns(pl.Series("group", found.group)).select(
        *KEY,
        pl.col("clip_id").min().over("group").alias("duplicate_group"),
        pl.Series("duplicate_of", [ids[i] if i >= 0 else None for i in found.of], types["duplicate_of"]),
        pl.Series("duplicate_kind", [KINDS[k] if k >= 0 else None for k in found.kind], types["duplicate_kind"]),
        pl.Series("duplicate_similarity", found.similarity, types["duplicate_similarity"]).fill_nan(None),
        "split",
    )


def _with_splits(clips: pl.DataFrame) -> pl.DataFrame:
    """Every group on one side: train if any of it is, else val if any of it is."""
    side = pl.col("split").replace_strict(
        {name: i for i, name in enumerate(SPLITS)}, default=None, return_dtype=pl.Int8
    )
    first = (
        side.min().over("duplicate_group").replace_strict(dict(enumerate(SPLITS)), default=None, return_dtype=pl.String)
    )
    return clips.with_columns(pl.coalesce(first, "split").alias("split"))


def _count(found: Deduplicated, before: pl.DataFrame, after: pl.DataFrame) -> None:
    repeats = after["duplicate_of"].is_not_null()
    found.groups = after.filter(pl.col("duplicate_group").is_duplicated())["duplicate_group"].n_unique()
    counted = dict(after.filter(repeats).group_by("duplicate_kind").len().iter_rows())
    found.duplicates = {kind: counted.get(kind, 0) for kind in KINDS}
    found.hours = float(before["seconds"].sum()) / 3600
    found.hours_saved = float(before.filter(repeats)["seconds"].sum()) / 3600
    found.splits_moved = int((before["split"] != after["split"]).sum())


def _write(catalog: Catalog, before: pl.DataFrame, after: pl.DataFrame) -> int:
    """Merge the rows that differ, in one commit; gives how many."""
    both = after.join(before.select(*KEY, *(pl.col(c).alias(f"old_{c}") for c in COLUMNS)), on=KEY)
    differs = pl.any_horizontal(pl.col(c).ne_missing(pl.col(f"old_{c}")) for c in COLUMNS)
    rows = both.filter(differs).select(*KEY, *COLUMNS)
    return catalog.upsert("clips", rows, only="update", at_once=True)


def _decide_again(catalog: Catalog, changed: bool) -> dict[str, int] | None:
    """Decide by the recipe in force, unless the decisions are what it says already."""
    recipe = current_recipe(catalog)
    if recipe is None:
        return None
    if not changed:
        wanted = verdicts(catalog, recipe).sort("clip_id").collect()
        if wanted.equals(catalog.scan("decisions").sort("clip_id").select(wanted.columns).collect()):
            return dict(wanted.group_by("status").len().iter_rows())
    return decide(catalog, recipe)
