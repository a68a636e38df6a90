"""The funnel: where every video and every clip of a catalog is, and the identities that must hold."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import polars as pl

from catalogs.tables.catalog import Catalog
from datakit.errors import CatalogError


@dataclass
class Funnel:
    """Counts of a catalog at one version. `videos = ok + quarantined + pending`,
    `clips = kept + rejected + pending + quarantined`.

    Attributes:
        quarantine: error kind -> videos.
        rejected_by: rule -> (clips it rejects, clips only it rejects).
        pending_on: rule -> clips waiting for it.
        clip_errors: failed stage -> clips.
        captions: style -> captions with a text; `caption_flags`: flag -> those that have it; `caption_errors`:
            those without a text.
        without_caption: kept clips that have no usable caption by the recipe.
        marks: keep, reject -> clips that a person marked so.
        hours: status -> hours of footage; `videos` for all of it.
    """

    videos: int = 0
    videos_ok: int = 0
    videos_quarantined: int = 0
    videos_pending: int = 0
    quarantine: dict[str, int] = field(default_factory=dict)
    clips: int = 0
    kept: int = 0
    rejected: int = 0
    pending: int = 0
    quarantined: int = 0
    rejected_by: dict[str, tuple[int, int]] = field(default_factory=dict)
    pending_on: dict[str, int] = field(default_factory=dict)
    clip_errors: dict[str, int] = field(default_factory=dict)
    levels: dict[str, int] = field(default_factory=dict)
    captions: dict[str, int] = field(default_factory=dict)
    caption_flags: dict[str, int] = field(default_factory=dict)
    caption_errors: int = 0
    without_caption: int = 0
    marks: dict[str, int] = field(default_factory=dict)
    hours: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict:
        return asdict(self)

    def check(self) -> None:
        """Raises:
        CatalogError: when the identities do not hold.
        """
        if self.videos != self.videos_ok + self.videos_quarantined + self.videos_pending:
            raise CatalogError(
                f"accounting: {self.videos} videos, but {self.videos_ok} ok + {self.videos_quarantined} quarantined "
                f"+ {self.videos_pending} pending"
            )
        if self.clips != self.kept + self.rejected + self.pending + self.quarantined:
            raise CatalogError(
                f"accounting: {self.clips} clips, but {self.kept} kept + {self.rejected} rejected + {self.pending} "
                f"pending + {self.quarantined} quarantined"
            )


def funnel(catalog: Catalog) -> Funnel:
    """Count a catalog, at one version of each table.

    Raises:
        CatalogError: when the numbers do not add up, or a video's clips are not as many as its row says.
    """
    with catalog.reading():
        return _funnel(catalog, catalog.versions())


def _funnel(catalog: Catalog, versions: dict[str, int]) -> Funnel:
    result = Funnel()
    videos = (
        catalog.scan("videos", versions["videos"])
        .select("video_id", "status", "error_kind", "duration_s", "clip_count")
        .collect()
    )
    result.videos = videos.height
    by_status = dict(videos.group_by("status").len().iter_rows())
    result.videos_ok = by_status.get("ok", 0)
    result.videos_quarantined = by_status.get("quarantined", 0)
    result.videos_pending = by_status.get("pending", 0)
    failed = videos.filter(pl.col("status") == "quarantined")
    result.quarantine = _counts(failed, "error_kind")
    result.hours["videos"] = float(videos["duration_s"].sum() or 0) / 3600

    columns = ["clip_id", "video_id", "status", "reasons", "level", "mark", "caption_style", "start_s", "end_s"]
    clips = (
        catalog.clips(versions, columns).with_columns((pl.col("end_s") - pl.col("start_s")).alias("seconds")).collect()
    )
    result.clips = clips.height
    counts = dict(clips.group_by("status").len().iter_rows())
    result.kept, result.rejected = counts.get("kept", 0), counts.get("rejected", 0)
    result.pending, result.quarantined = counts.get("pending", 0), counts.get("quarantined", 0)
    for status, seconds in clips.group_by("status").agg(pl.col("seconds").sum()).iter_rows():
        result.hours[status] = seconds / 3600
    result.rejected_by = _rejections(clips.filter(pl.col("status") == "rejected"))
    result.pending_on = _counts(
        clips.filter(pl.col("status") == "pending").explode("reasons").drop_nulls("reasons"), "reasons"
    )
    result.clip_errors = _counts(clips.filter(pl.col("status") == "quarantined").explode("reasons"), "reasons")
    result.levels = {
        str(k): v for k, v in sorted(clips.filter(pl.col("status") == "kept").group_by("level").len().iter_rows())
    }
    result.marks = _counts(clips.drop_nulls("mark"), "mark")
    _count_captions(catalog.captions(versions), result)
    result.without_caption = clips.filter((pl.col("status") == "kept") & pl.col("caption_style").is_null()).height
    result.check()
    _check_clip_counts(catalog, videos, clips)
    return result


def _count_captions(captions: pl.LazyFrame, result: Funnel) -> None:
    rows = captions.select("style", "flags", pl.col("text").is_not_null().alias("has_text")).collect()
    result.captions = _counts(rows.filter("has_text"), "style")
    result.caption_flags = _counts(rows.explode("flags").drop_nulls("flags"), "flags")
    result.caption_errors = rows.height - int(rows["has_text"].sum())


def _rejections(rejected: pl.DataFrame) -> dict[str, tuple[int, int]]:
    alone = rejected.filter(pl.col("reasons").list.len() == 1)
    every, only = _counts(rejected.explode("reasons"), "reasons"), _counts(alone.explode("reasons"), "reasons")
    return {rule: (count, only.get(rule, 0)) for rule, count in every.items()}


def _counts(frame: pl.DataFrame, column: str) -> dict[str, int]:
    counted = frame.group_by(column).len().sort("len", column, descending=[True, False])
    return {str(k): v for k, v in counted.iter_rows()}


def _check_clip_counts(catalog: Catalog, videos: pl.DataFrame, clips: pl.DataFrame) -> None:
    """The commit marker of every video says how many clips it has; more than it has only while they are being
    forgotten."""
    counted = clips.group_by("video_id").len()
    compared = videos.filter(pl.col("status") == "ok").join(counted, on="video_id", how="left")
    wrong = compared.filter(pl.col("clip_count") != pl.col("len").fill_null(0))
    if wrong.height:
        forgotten = catalog.scan("forgotten").select("video_id").collect()["video_id"].unique().to_list()
        wrong = wrong.filter(
            ~(pl.col("video_id").is_in(forgotten) & (pl.col("clip_count") > pl.col("len").fill_null(0)))
        )
    if wrong.height:
        video_id, _, _, _, says, has = wrong.row(0)
        raise CatalogError(
            f"accounting: {wrong.height} videos have other clips than their rows say; first {video_id}: {says} "
            f"expected, {has or 0} found"
        )
