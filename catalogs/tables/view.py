"""The view `clips`: one row per candidate clip that counts, with what the other tables know about it.

Only the tables that the wanted columns come from are read and joined.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import polars as pl

from catalogs.tables.schema import CLIPS, VIEW_FROM_VIDEOS
from datakit.errors import CatalogError

if TYPE_CHECKING:
    from catalogs.tables.catalog import Catalog

OWN = frozenset(c.name for c in CLIPS)
FROM_DECISIONS = ("status", "reasons", "level")
FROM_CAPTIONS = {"caption": "text", "caption_style": "style", "caption_model": "model", "caption_flags": "flags"}
"""Columns of the view, and those of the table `captions` they come from."""
FROM_MARKS = ("mark", "comment")


def view(catalog: Catalog, versions: dict[str, int], columns: Sequence[str]) -> pl.LazyFrame:
    """See `Catalog.clips`."""
    wanted = set(columns)
    _check(wanted, catalog.view_columns())
    clips = _with_videos(catalog, versions, wanted)
    if wanted & {*FROM_DECISIONS, *FROM_CAPTIONS}:
        clips = _with_decisions(catalog, versions, clips)
    if wanted & {*FROM_MARKS, *FROM_DECISIONS}:
        clips = clips.join(catalog.marks(versions).select("clip_id", *FROM_MARKS), on="clip_id", how="left")
    if wanted & {*FROM_DECISIONS}:
        clips = _marks_win(clips)
    if wanted & {*FROM_CAPTIONS}:
        texts = catalog.scan("captions", versions.get("captions")).select(
            "caption_id", *(pl.col(theirs).alias(ours) for ours, theirs in FROM_CAPTIONS.items())
        )
        clips = clips.join(texts, on="caption_id", how="left")
    if "loss" in wanted:
        clips = clips.join(_losses(catalog, versions), on="clip_id", how="left")
    return clips.select(columns)


def unknown_column(name: str, known: Sequence[str]) -> str:
    """What to say about a column that is not there."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"no column {name!r}" + (f": did you mean {close[0]}?" if close else " (see `datakit catalog show`)")


def _check(wanted: set[str], known: list[str]) -> None:
    unknown = sorted(wanted - set(known))
    if unknown:
        raise CatalogError(unknown_column(unknown[0], known))


def _with_videos(catalog: Catalog, versions: dict[str, int], wanted: set[str]) -> pl.LazyFrame:
    """Rows of `clips` made by the run that finished their video, with that video's facts."""
    facts = [name for name in VIEW_FROM_VIDEOS if name in wanted]
    if not facts and "uri" not in wanted:
        return catalog.finished_clips(versions)
    address = pl.col("uris").list.first().struct.field("uri").alias("uri")
    videos = catalog.scan("videos", versions.get("videos")).filter(pl.col("status") == "ok")
    videos = videos.select("video_id", "run_id", *([address] if "uri" in wanted else []), *facts)
    return catalog.scan("clips", versions.get("clips")).join(videos, on=["video_id", "run_id"], how="inner")


def _with_decisions(catalog: Catalog, versions: dict[str, int], clips: pl.LazyFrame) -> pl.LazyFrame:
    decisions = catalog.scan("decisions", versions.get("decisions")).select("clip_id", *FROM_DECISIONS, "caption_id")
    return clips.join(decisions, on="clip_id", how="left").with_columns(pl.col("status").fill_null("pending"))


def _marks_win(clips: pl.LazyFrame) -> pl.LazyFrame:
    """A person's word counts more than the recipe's; a clip that could not be processed stays quarantined."""
    told = pl.col("status") != "quarantined"
    keep, reject = told & (pl.col("mark") == "keep"), told & (pl.col("mark") == "reject")
    text_list = pl.List(pl.String)
    return clips.with_columns(
        pl.when(keep).then(pl.lit("kept")).when(reject).then(pl.lit("rejected")).otherwise("status").alias("status"),
        pl.when(keep)
        .then(pl.lit([], text_list))
        .when(reject)
        .then(pl.lit(["mark"], text_list))
        .otherwise("reasons")
        .alias("reasons"),
        pl.when(keep)
        .then(pl.max_horizontal("level", pl.lit(1)))
        .when(reject)
        .then(0)
        .otherwise("level")
        .cast(pl.Int32)
        .alias("level"),
    )


def _losses(catalog: Catalog, versions: dict[str, int]) -> pl.LazyFrame:
    sums = (
        catalog.scan("losses", versions.get("losses"))
        .group_by("clip_id")
        .agg(pl.col("excess").sum(), pl.col("count").sum())
    )
    return sums.select("clip_id", (pl.col("excess") / pl.col("count")).alias("loss"))
