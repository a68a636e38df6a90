"""`datakit run decide`: rules over stored scores give every clip a status, and one of its captions the
preference. Opens no video."""

from __future__ import annotations

import json

import polars as pl
from pydantic import ValidationError

from catalogs.query.funnel import Funnel, funnel
from catalogs.records.runs import RunRecord
from catalogs.tables.catalog import Catalog
from catalogs.tables.view import FROM_CAPTIONS
from datakit.errors import ConfigError
from pipelines.captioning.caption_quality import UNUSABLE
from pipelines.recipes.recipe import Recipe, RecipeFile, build

ROUNDS = 5


def decide(catalog: Catalog, recipe: Recipe) -> dict[str, int]:
    """Rewrite `decisions` from the catalog as it is now.

    Another ingest may finish clips while this writes, and its decisions may be overwritten by this; so it
    looks again. What still arrives after some rounds is `pending` until that ingest decides at its own end.

    Returns:
        clips by status, people's marks counted in.
    """
    with catalog.reading():
        for _ in range(ROUNDS):
            catalog.replace("decisions", verdicts(catalog, recipe).collect())
            undecided = catalog.finished_clips().join(catalog.scan("decisions"), on="clip_id", how="anti")
            if undecided.select(pl.len()).collect().item() == 0:
                break
        return dict(catalog.clips(columns=["status"]).group_by("status").len().collect().iter_rows())


def decide_and_record(catalog: Catalog, recipe: Recipe) -> Funnel:
    """`decide` as a run of its own: it is in `runs`, and its recipe is the one in force from then on."""
    with RunRecord(
        catalog, "decide", {"recipe": recipe.label, "recipe_rules": recipe.file.model_dump()}
    ).running() as counts:
        decide(catalog, recipe)
        counted = funnel(catalog)
        counts["funnel"] = counted.as_dict()
    return counted


def verdicts(catalog: Catalog, recipe: Recipe) -> pl.LazyFrame:
    """The rows of `decisions` that a recipe gives, captions chosen; writes nothing."""
    chosen = preferred_captions(catalog, recipe)
    return recipe.decide(judged(catalog, recipe, {"clip_id", "shard"})).join(
        chosen.select("clip_id", "caption_id"), on="clip_id", how="left"
    )


def judged(catalog: Catalog, recipe: Recipe, columns: set[str]) -> pl.LazyFrame:
    """What a recipe looks at: `errors`, the columns of its rules, and others of the view. Captions are those that the
    recipe prefers, not those chosen before."""
    versions = catalog.versions()
    wanted = recipe.columns() | columns | {"clip_id", "errors"}
    texts = {ours: theirs for ours, theirs in FROM_CAPTIONS.items() if ours in wanted}
    clips = catalog.clips(versions, sorted(wanted - set(texts)))
    if not texts:
        return clips
    written = catalog.scan("captions", versions.get("captions")).select(
        "caption_id", *(pl.col(theirs).alias(ours) for ours, theirs in texts.items())
    )
    chosen = preferred_captions(catalog, recipe, versions).join(written, on="caption_id").drop("caption_id")
    return clips.join(chosen, on="clip_id", how="left")


def preferred_captions(catalog: Catalog, recipe: Recipe, versions: dict[str, int] | None = None) -> pl.LazyFrame:
    """`clip_id` and `caption_id` of the caption that the recipe prefers, for every clip that has usable ones: by style,
    then the one with fewest flags, then the newest."""
    order = {style: rank for rank, style in enumerate(recipe.file.captions)}
    usable = pl.col("text").is_not_null() & pl.col("style").is_in(list(order))
    usable &= ~pl.col("flags").list.eval(pl.element().is_in(list(UNUSABLE))).list.any().fill_null(False)
    rank = pl.col("style").replace_strict(order, return_dtype=pl.Int32, default=None)
    ranked = (
        catalog.captions(versions)
        .filter(usable)
        .select("clip_id", "caption_id", rank.alias("rank"), pl.col("flags").list.len().alias("flagged"), "created_at")
    )
    ranked = ranked.sort("rank", "flagged", "created_at", "caption_id", descending=[False, False, True, False])
    return ranked.unique("clip_id", keep="first", maintain_order=True).select("clip_id", "caption_id")


def redecide(catalog: Catalog) -> dict[str, int] | None:
    """Decide again by the rules in force, after columns were filled.

    Returns:
        clips by status; None when the catalog was never decided.
    """
    recipe = current_recipe(catalog)
    return None if recipe is None else decide(catalog, recipe)


def current_recipe(catalog: Catalog) -> Recipe | None:
    """The recipe of the decisions in the catalog, as the run that made them recorded it; None without any, or
    when its rules do not fit this datakit any more."""
    labels = set(catalog.scan("decisions").select("recipe").unique().collect()["recipe"])
    runs = catalog.scan("runs").sort("started_at", descending=True).select("config").collect()["config"]
    for config in runs:
        rules = json.loads(config).get("recipe_rules")
        if rules is None:
            continue
        try:
            recipe = build(RecipeFile.model_validate(rules))
        except (ValidationError, ConfigError):
            continue
        if recipe.label in labels:
            return recipe
    return None
