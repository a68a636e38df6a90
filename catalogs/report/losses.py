"""What training learned: the loss by kinds of clips."""

from __future__ import annotations

import polars as pl

from catalogs.report.facts import UNKNOWN, resolution_class
from catalogs.selection import Selection

MOST = 12
"""Names of a slice that are shown, the most frequent ones."""


def losses(selection: Selection) -> dict[str, pl.DataFrame]:
    """Slice -> name, clips, mean loss and its standard error; nothing without losses."""
    if not selection.catalog.scan("losses").select(pl.len()).collect().item():
        return {}
    columns = ["loss", "camera_motion", "width", "height", "motion", "license", "source_url", "codec", "start_s", "end_s"]
    rows = selection.rows(columns).filter(pl.col("loss").is_finite()).collect(engine="streaming")
    if rows.is_empty():
        return {}
    names = {
        "Camera motion": pl.col("camera_motion").fill_null("not measured"), "Shorter side, px": resolution_class(),
        "Motion, tenths": _tenths("motion", rows), "Duration": _duration(),
        "Source": pl.col("source_url").str.extract(r"://([^/?#]*)", 1).fill_null(UNKNOWN),
        "Licence": pl.col("license").fill_null(UNKNOWN), "Codec": pl.col("codec").fill_null(UNKNOWN),
    }
    sliced = {title: _slice(rows, name) for title, name in names.items()}
    return {title: frame for title, frame in sliced.items() if frame.height > 1 or title == "Camera motion"}


def _tenths(column: str, rows: pl.DataFrame) -> pl.Expr:
    """Tenths of the clips by a score; equal scores are in one of them."""
    have = rows[column].drop_nulls()
    if have.n_unique() < 10:
        return pl.col(column).cast(pl.String).fill_null("not measured")
    cuts = [have.quantile(i / 10) for i in range(1, 10)]
    label = pl.when(pl.col(column).is_null()).then(pl.lit("not measured"))
    for index, cut in enumerate(cuts):
        label = label.when(pl.col(column) < cut).then(pl.lit(f"{index + 1}: below {cut:.3g}"))
    return label.otherwise(pl.lit(f"10: {cuts[-1]:.3g} and more"))


def _duration() -> pl.Expr:
    length = pl.col("end_s") - pl.col("start_s")
    shorter = pl.when(length < 2).then(pl.lit("< 2 s")).when(length < 4).then(pl.lit("2 … 4 s"))
    return shorter.when(length < 8).then(pl.lit("4 … 8 s")).otherwise(pl.lit("≥ 8 s"))


def _slice(rows: pl.DataFrame, name: pl.Expr) -> pl.DataFrame:
    spread = (pl.col("loss").std() / pl.len().sqrt()).fill_null(0.0).alias("error")
    grouped = rows.group_by(name.alias("name")).agg(pl.len().alias("clips"), pl.col("loss").mean().alias("mean"), spread)
    return grouped.sort("clips", descending=True).head(MOST).sort("mean", "name")
