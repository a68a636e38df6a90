"""The table `losses`: what training runs learn about clips, entered exactly once for each range of steps; and what the
runs' rows in `runs` say of the loss."""

from __future__ import annotations

from functools import partial

import polars as pl

from catalogs.records.tombstones import Forgotten
from catalogs.tables.arrow_types import polars_schema
from catalogs.tables.catalog import Catalog
from catalogs.tables.sql_text import quoted

MEANS = "loss_by_noise_level"
"""In the counts of a training run: bucket -> running mean of the loss at each noise level (None: not seen)."""
NOISE_LEVELS = 10
"""Tenths of the time of a sample, 0 (data) to 1 (noise)."""
RANGE = ("from_step", "to_step")
LEARNED = {
    "catalog": pl.String,
    "clip_id": pl.String,
    "video_id": pl.String,
    "stream": pl.Int32,
    "start_pts": pl.Int64,
    "end_pts": pl.Int64,
    "bucket": pl.String,
    "noise_level": pl.Int32,
    "excess": pl.Float64,
    "count": pl.Int64,
    "from_step": pl.Int64,
    "to_step": pl.Int64,
}
"""Columns of what a range of steps learned: those of the table `losses`, with the catalog's address and the clip's span
in place of shard and run."""


def commit(catalog: Catalog, run_id: str, rows: pl.DataFrame) -> int:
    """Enter what a run learned (`LEARNED`, of clips of this catalog): one Delta commit for each range of steps, none
    where the range is there. Clips that were forgotten get no rows. Returns the rows entered.

    Raises:
        CatalogError: the catalog cannot be written.
    """
    shard = pl.col("video_id").str.slice(0, catalog.shard_digits)
    rows = rows.with_columns(shard=shard, run_id=pl.lit(run_id))
    return sum(
        catalog.upsert("losses", of_range, only="insert", at_once=True, revise=partial(_not_entered, catalog))
        for _, of_range in rows.group_by(RANGE, maintain_order=True)
    )


def _not_entered(catalog: Catalog, rows: pl.DataFrame, table: pl.LazyFrame) -> pl.DataFrame:
    """Rows of one range to enter in a version of the table: another may have entered the same range since the last, or
    forgotten clips."""
    same = (pl.col("run_id") == rows["run_id"][0]) & (pl.col("from_step") == rows["from_step"][0])
    is_there = table.filter(same).limit(1).collect().height > 0
    new = rows.clear() if is_there else rows.filter(~Forgotten.read(catalog).covers(rows))
    return new.select(polars_schema("losses").keys())


def rewind(catalog: Catalog, run_id: str, step: int) -> int:
    """Remove what a run entered of this step and later ones, before it goes on from there. Returns the rows removed."""
    return catalog.delete("losses", f"run_id = {quoted(run_id)} AND to_step > {step}")
