"""Captions that came with their clips: of a data set that is imported, or the prompts that samples were made from."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

import polars as pl

from catalogs.tables.arrow_types import full_rows
from catalogs.tables.catalog import Catalog
from datakit.identity import caption_id


def enter_captions(catalog: Catalog, run_id: str, captions: Mapping[str, dict], origin: str) -> int:
    """Add captions, and change those whose text is another now.

    Args:
        run_id: of the run that enters them.
        captions: by clip_id: shard, text, style, model, flags.
        origin: stands in place of a backend, and of the settings that a model was asked with.

    Returns:
        how many were added or changed.
    """
    now = datetime.now(UTC)
    rows = [
        {
            **caption,
            "caption_id": caption_id(clip, caption["style"], caption["model"]),
            "clip_id": clip,
            "backend": origin,
            "fingerprint": origin,
            "run_id": run_id,
            "created_at": now,
        }
        for clip, caption in captions.items()
    ]
    return catalog.upsert("captions", full_rows("captions", rows), revise=_changed)


def _changed(rows: pl.DataFrame, table: pl.LazyFrame) -> pl.DataFrame:
    """Captions that the table has not, or with another text."""
    old = table.filter(pl.col("caption_id").is_in(rows["caption_id"].to_list())).select("caption_id", "text").collect()
    return rows.join(old, on=["caption_id", "text"], how="anti")
