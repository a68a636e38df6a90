"""`datakit run decide`: rules over stored scores give every clip a status. Opens no video."""

from __future__ import annotations

import polars as pl

from catalogs.tables import Catalog
from datakit.errors import CatalogError
from pipelines.recipe import Recipe

ROUNDS = 5


def decide(catalog: Catalog, recipe: Recipe) -> dict[str, int]:
    """Rewrite `decisions` from the catalog as it is now.

    Another ingest may finish clips while this writes; so it looks again until every clip has a decision.

    Returns:
        clips by status.
    """
    for _ in range(ROUNDS):
        clips = catalog.clips()
        wanted = recipe.columns() | {"clip_id", "shard", "errors"}
        decisions = recipe.decide(clips.select(sorted(wanted))).collect()
        catalog.replace("decisions", decisions)
        undecided = catalog.finished_clips().join(catalog.scan("decisions"), on="clip_id", how="anti")
        if undecided.select(pl.len()).collect().item() == 0:
            counts = decisions.group_by("status").len()
            return dict(counts.iter_rows())
    raise CatalogError("clips keep arriving: run `datakit run decide` again when the other ingest is done")
