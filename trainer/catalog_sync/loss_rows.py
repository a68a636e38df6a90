"""What a training run learned about clips in a range of steps: as rows of a file, and entered in the table `losses`
exactly once."""

from __future__ import annotations

import io
from pathlib import Path

import polars as pl

from catalogs.records.tombstones import Forgotten
from catalogs.tables.catalog import Catalog, sql_list
from datakit.errors import ConfigError

FILE = "losses.arrow"
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
    entered = 0
    for (start, _), of_range in rows.group_by(RANGE, maintain_order=True):
        once = f"t.run_id = {_quoted(run_id)} AND t.from_step = {start}"
        same = " AND ".join(f"t.{name} = s.{name}" for name in ("clip_id", "bucket", "noise_level"))

        def make(table: pl.LazyFrame) -> tuple[pl.DataFrame, dict]:
            """As the table is at this attempt: another may have entered the same range, or forgotten clips, since the
            last."""
            there = (
                table.filter((pl.col("run_id") == run_id) & (pl.col("from_step") == start)).limit(1).collect().height
            )
            new = of_range.clear() if there else of_range.filter(~Forgotten.read(catalog).covers(of_range))
            return _entries(catalog, run_id, new), {"on": f"{once} AND {same}", "insert": True}

        entered += catalog.update("losses", make)
    return entered


def rewind(catalog: Catalog, run_id: str, step: int) -> int:
    """Remove what a run entered of this step and later ones, before it goes on from there. Returns the rows removed."""
    return catalog.delete("losses", f"run_id = {_quoted(run_id)} AND to_step > {step}")


def as_bytes(rows: pl.DataFrame) -> bytes:
    """An Arrow file."""
    file = io.BytesIO()
    rows.write_ipc(file, compression="zstd")
    return file.getvalue()


def read_rows(path: Path) -> pl.DataFrame:
    """Raises:
    ConfigError: not there, or damaged.
    """
    try:
        return pl.read_ipc(path.read_bytes()).select(list(LEARNED))
    except (OSError, pl.exceptions.PolarsError) as e:
        raise ConfigError(
            f"the checkpoint's {path} is missing or damaged: resume from another checkpoint, or with write_back=false"
        ) from e


def no_rows() -> pl.DataFrame:
    return pl.DataFrame(schema=LEARNED)


def _entries(catalog: Catalog, run_id: str, rows: pl.DataFrame) -> pl.DataFrame:
    """Rows of the table `losses`."""
    shard = pl.col("video_id").str.slice(0, catalog.shard_digits)
    return rows.select(
        "clip_id",
        shard.alias("shard"),
        pl.lit(run_id).alias("run_id"),
        "bucket",
        "noise_level",
        "excess",
        "count",
        *RANGE,
    )


def _quoted(text: str) -> str:
    return sql_list([text])[1:-1]
