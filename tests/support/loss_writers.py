"""Processes that write what was learned about clips into a catalog; some die of it. Without torch, which takes long to
import."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import polars as pl
from deltalake.table import TableMerger

from catalogs.records.losses import LEARNED, commit
from catalogs.tables.catalog import Catalog
from trainer.catalog_sync.loss_rows import read_rows


def learned(catalog: Catalog, ids: list[str], start: int, end: int, excess: float = 1.0) -> pl.DataFrame:
    """A row of each clip."""
    clips = catalog.scan("clips").filter(pl.col("clip_id").is_in(ids)).collect()
    spans = clips.select("clip_id", "video_id", "stream", "start_pts", "end_pts")
    return spans.with_columns(
        catalog=pl.lit(catalog.root),
        bucket=pl.lit("32x48x5"),
        noise_level=pl.lit(3, pl.Int32),
        excess=pl.lit(excess),
        count=pl.lit(2, pl.Int64),
        from_step=pl.lit(start, pl.Int64),
        to_step=pl.lit(end, pl.Int64),
    ).select(list(LEARNED))


def commit_all(root: str, run_id: str, ids: list[str], ranges: list[tuple[int, int]], gate, found) -> None:
    catalog = Catalog(root)
    work = [learned(catalog, ids, *r) for r in ranges]
    gate.wait()
    found.put(sum(commit(catalog, run_id, rows) for rows in work))


def decide(root: str, gate, found) -> None:
    from pipelines.recipes.decide import decide_and_record
    from pipelines.recipes.recipe import load_recipe

    catalog = Catalog(root)
    gate.wait()
    for name in ("technical", "svd"):
        decide_and_record(catalog, load_recipe(name))
    found.put(0)


def commit_and_die(root: str, run_id: str, file: str, at: str) -> None:
    """SIGKILL `before` or `after` Delta's log has the commit."""
    execute = TableMerger.execute

    def die(merger: TableMerger) -> None:
        if at == "after":
            execute(merger)
        os.kill(os.getpid(), signal.SIGKILL)

    TableMerger.execute = die
    commit(Catalog(root), run_id, read_rows(Path(file)).filter(pl.col("catalog") == root))
