"""`datakit run decide`: rules over stored scores give every clip a status. Opens no video."""

from __future__ import annotations

import polars as pl

from catalogs.tables import Catalog
from pipelines.recipe import Recipe

ROUNDS = 5


def decide(catalog: Catalog, recipe: Recipe) -> dict[str, int]:
    """Rewrite `decisions` from the catalog as it is now.

    Another ingest may finish clips while this writes, and its decisions may be overwritten by this; so it
    looks again. What still arrives after some rounds is `pending` until that ingest decides at its own end.

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
            break
    return dict(decisions.group_by("status").len().iter_rows())
