"""`datakit run decide`: rules over stored scores give every clip a status, and one of its captions the
preference. Opens no video."""

from __future__ import annotations

import json

import polars as pl
from pydantic import ValidationError

from catalogs.tables import Catalog
from pipelines.caption_text import UNUSABLE
from pipelines.recipe import Recipe, RecipeFile, build

ROUNDS = 5
CAPTION_COLUMNS = {"caption": "text", "caption_style": "style", "caption_model": "model", "caption_flags": "flags"}
"""Columns of the view, and those of the table `captions` they come from."""


def decide(catalog: Catalog, recipe: Recipe) -> dict[str, int]:
    """Rewrite `decisions` from the catalog as it is now.

    Another ingest may finish clips while this writes, and its decisions may be overwritten by this; so it
    looks again. What still arrives after some rounds is `pending` until that ingest decides at its own end.

    Returns:
        clips by status.
    """
    for _ in range(ROUNDS):
        decisions = verdicts(catalog, recipe).collect()
        catalog.replace("decisions", decisions)
        undecided = catalog.finished_clips().join(catalog.scan("decisions"), on="clip_id", how="anti")
        if undecided.select(pl.len()).collect().item() == 0:
            break
    return dict(decisions.group_by("status").len().iter_rows())


def verdicts(catalog: Catalog, recipe: Recipe) -> pl.LazyFrame:
    """The rows of `decisions` that a recipe gives, captions chosen; writes nothing."""
    chosen = preferred_captions(catalog, recipe)
    texts = [pl.col(theirs).alias(ours) for ours, theirs in CAPTION_COLUMNS.items()]
    clips = catalog.clips().drop(*CAPTION_COLUMNS).join(chosen.select("clip_id", *texts), on="clip_id", how="left")
    wanted = recipe.columns() | {"clip_id", "shard", "errors"}
    return recipe.decide(clips.select(sorted(wanted))).join(chosen.select("clip_id", "caption_id"), on="clip_id", how="left")


def preferred_captions(catalog: Catalog, recipe: Recipe) -> pl.LazyFrame:
    """For every clip that has usable captions the row of the one that the recipe prefers: by style, then the
    one with fewest flags, then the newest."""
    order = {style: rank for rank, style in enumerate(recipe.file.captions)}
    usable = pl.col("text").is_not_null() & pl.col("style").is_in(list(order))
    usable &= ~pl.col("flags").list.eval(pl.element().is_in(list(UNUSABLE))).list.any().fill_null(False)
    ranked = catalog.captions().filter(usable).with_columns(
        pl.col("style").replace_strict(order, return_dtype=pl.Int32).alias("rank"), pl.col("flags").list.len().alias("flagged"))
    ranked = ranked.sort("rank", "flagged", "created_at", "caption_id", descending=[False, False, True, False])
    return ranked.unique("clip_id", keep="first", maintain_order=True)


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
            recipe = build(RecipeFile.model_validate(rules), catalog.view_columns())
        except ValidationError:
            continue
        if recipe.label in labels:
            return recipe
    return None
