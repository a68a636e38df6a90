"""A sample's prompt is the caption of its clip: what `caption_match` compares with, and people see.

`datakit sample` enters them itself; this is for result catalogs that lost them, or that somebody decided about by a
recipe which prefers other captions.
"""

from __future__ import annotations

import polars as pl

from catalogs.records.captions import enter_captions
from catalogs.records.runs import RunRecord
from catalogs.tables.catalog import Catalog
from pipelines.recipes.decide import current_recipe, decide_and_record
from pipelines.recipes.recipe import Recipe, build, load_recipe

STYLE = MODEL = "prompt"
RECIPE = "samples"
"""Of a result catalog that nobody has decided about."""


def enter_prompts(catalog: Catalog) -> int:
    """Make prompts the captions of a result catalog's clips, preferred to others; how many were new. Done again, it
    does nothing."""
    done = catalog.scan("samples").filter(
        (pl.col("status") == "done") & pl.col("clip_id").is_not_null() & (pl.col("prompt") != "")
    )
    prompts = done.join(catalog.finished_clips().select("clip_id", "shard"), on="clip_id").sort("sample_id")
    wanted = prompts.select(
        "clip_id", "shard", text="prompt"
    ).collect()  # samples of one content may have several prompts: any will do
    there = (
        catalog.scan("captions")
        .filter((pl.col("style") == STYLE) & (pl.col("model") == MODEL))
        .select("clip_id", "text")
        .collect()
    )
    had = wanted.join(there, on=["clip_id", "text"], how="semi")
    new = wanted.join(had, on="clip_id", how="anti").unique("clip_id", keep="first", maintain_order=True)
    if new.height:
        with RunRecord(catalog, "prompts", {}).running() as counts:
            captions = {
                row["clip_id"]: {
                    "text": row["text"],
                    "style": STYLE,
                    "model": MODEL,
                    "flags": [],
                    "shard": row["shard"],
                }
                for row in new.iter_rows(named=True)
            }
            counts["captions"] = enter_captions(catalog, catalog.signature["run_id"], captions, MODEL)
    shown = (
        catalog.clips(columns=["clip_id", "caption", "caption_style"])
        .filter(pl.col("caption_style") == STYLE)
        .collect()
    )
    if wanted.join(shown, on="clip_id", how="anti").height:
        decide_and_record(catalog, _preferring_prompts(current_recipe(catalog) or load_recipe(RECIPE)))
    return new.height


def _preferring_prompts(recipe: Recipe) -> Recipe:
    """The recipe, with the style of prompts before all others."""
    styles = [STYLE, *(style for style in recipe.file.captions if style != STYLE)]
    return build(recipe.file.model_copy(update={"captions": styles}))
