"""What the report counts: the funnel, kinds of footage, sources, licences, quarantine, duplicates, splits, runs."""

from __future__ import annotations

import json
import os.path
from dataclasses import dataclass

import polars as pl

from catalogs.query.selection import Selection
from catalogs.report.score_distributions import binned

STATUSES = ("kept", "rejected", "pending", "quarantined")
UNKNOWN = "unknown"
SHORT_SIDES = (
    (240, "< 240"),
    (360, "240 … 359"),
    (480, "360 … 479"),
    (720, "480 … 719"),
    (1080, "720 … 1079"),
    (1440, "1080 … 1439"),
    (2160, "1440 … 2159"),
)
ASPECTS = (
    ("9:21", 9 / 21),
    ("9:16", 9 / 16),
    ("2:3", 2 / 3),
    ("3:4", 3 / 4),
    ("4:5", 4 / 5),
    ("1:1", 1.0),
    ("5:4", 5 / 4),
    ("4:3", 4 / 3),
    ("3:2", 3 / 2),
    ("16:9", 16 / 9),
    ("1.85:1", 1.85),
    ("2:1", 2.0),
    ("21:9", 21 / 9),
    ("2.39:1", 2.39),
)
ASPECT_TOLERANCE = 0.02
EXAMPLES = 3
SEPARATOR = "\x1f"
"""Between reasons that are counted as one text; no rule has it in its name."""

seconds = (pl.col("end_s") - pl.col("start_s")).fill_null(0.0)


@dataclass(frozen=True)
class Facts:
    """Frames with the columns of `tally` (clips, kept, hours, kept_hours) unless told otherwise.

    Attributes:
        videos: status -> videos, of the whole catalog; `video_hours` of all of them.
        status: one row a status. `levels`, `splits`: by level, split.
        rejections: rule, clips, alone (clips that no other rule rejects). `waiting`: rule, clips.
        kinds: title of a chart -> its tally, under `name`.
        durations: see `numbers.binned`.
    """

    clips: int
    videos: dict[str, int]
    video_hours: float
    status: dict[str, tuple[int, float]]
    levels: pl.DataFrame
    splits: pl.DataFrame
    rejections: pl.DataFrame
    waiting: pl.DataFrame
    kinds: dict[str, pl.DataFrame]
    durations: dict | None
    seconds: pl.Series
    sources: pl.DataFrame
    licenses: pl.DataFrame
    uncaptioned: int


def facts(selection: Selection) -> Facts:
    """Count the clips of a selection and the videos of its catalog."""
    clips = _clips(selection)
    videos = selection.catalog.scan("videos").select("status", "duration_s").collect()
    by_video = _with_videos(selection)
    status = {
        name: (n, s / 3600)
        for name, n, s in clips.group_by("status").agg(pl.len(), pl.col("seconds").sum()).iter_rows()
    }
    span = clips.filter(pl.col("seconds") > 0)
    rejections, waiting = _reasons(clips)
    return Facts(
        clips=clips.height,
        videos=dict(videos.group_by("status").len().iter_rows()),
        video_hours=float(videos["duration_s"].sum() or 0) / 3600,
        status={name: status.get(name, (0, 0.0)) for name in STATUSES},
        rejections=rejections,
        waiting=waiting,
        levels=tally(clips.filter("kept"), pl.col("level")).sort("name"),
        splits=tally(clips, pl.col("split").cast(pl.String).fill_null("none yet")),
        kinds=_kinds(clips, by_video),
        durations=_durations(span),
        seconds=span["seconds"],
        sources=tally(by_video, pl.col("source")),
        licenses=tally(by_video, pl.col("license").fill_null(UNKNOWN)),
        uncaptioned=clips.filter(pl.col("kept") & ~pl.col("captioned")).height,
    )


def tally(rows: pl.DataFrame, name: pl.Expr) -> pl.DataFrame:
    """Clips and hours by some name, most clips first.

    Args:
        rows: with `kept` and `seconds` of one clip each, or the sums `clips`, `kept`, `seconds`, `kept_seconds`.
    """
    if "clips" in rows.columns:
        sums = [pl.col("clips").sum(), pl.col("kept").sum(), pl.col("seconds").sum(), pl.col("kept_seconds").sum()]
    else:
        kept_seconds = pl.col("seconds").filter("kept").sum().alias("kept_seconds")
        sums = [pl.len().alias("clips"), pl.col("kept").sum(), pl.col("seconds").sum(), kept_seconds]
    grouped = (
        rows.group_by(name.alias("name")).agg(sums).sort("clips", "name", descending=[True, False], nulls_last=True)
    )
    return grouped.with_columns(
        (pl.col("seconds") / 3600).alias("hours"), (pl.col("kept_seconds") / 3600).alias("kept_hours")
    )


def resolution_class() -> pl.Expr:
    """A name for the size of the shorter side."""
    short = pl.min_horizontal("width", "height")
    found = pl.when(short.is_null()).then(pl.lit(UNKNOWN))
    for limit, name in SHORT_SIDES:
        found = found.when(short < limit).then(pl.lit(name))
    return found.otherwise(pl.lit("≥ 2160"))


def aspect_class() -> pl.Expr:
    """The name of the nearest usual shape."""
    ratio = pl.col("width") / pl.col("height")
    found = pl.when(ratio.is_null()).then(pl.lit(UNKNOWN))
    for name, value in ASPECTS:
        found = found.when((ratio / value - 1).abs() < ASPECT_TOLERANCE).then(pl.lit(name))
    return found.otherwise(pl.lit("other"))


def _clips(selection: Selection) -> pl.DataFrame:
    """One small row a clip: names become categories."""
    columns = [
        "status",
        "reasons",
        "level",
        "start_s",
        "end_s",
        "width",
        "height",
        "fps",
        "camera_motion",
        "split",
        "caption_style",
    ]
    category = pl.Categorical()
    return (
        selection.rows(columns)
        .select(
            pl.col("status", "camera_motion", "split").cast(category),
            pl.col("reasons").list.join(SEPARATOR).cast(category),
            "level",
            seconds.cast(pl.Float32).alias("seconds"),
            pl.col("width", "height"),
            pl.col("fps").round(2).cast(pl.Float32),
            kept=pl.col("status") == "kept",
            captioned=pl.col("caption_style").is_not_null(),
        )
        .collect(engine="streaming")
        .with_columns(pl.col("status").cast(pl.String), pl.col("seconds").cast(pl.Float64))
    )


def _with_videos(selection: Selection) -> pl.DataFrame:
    """The sums of each video's clips, with what `videos` knows about it."""
    kept = pl.col("status") == "kept"
    sums = (
        selection.rows(["video_id", "status", "start_s", "end_s"])
        .group_by("video_id")
        .agg(
            pl.len().alias("clips"),
            kept.sum().alias("kept"),
            seconds.sum().alias("seconds"),
            seconds.filter(kept).sum().alias("kept_seconds"),
        )
    )
    uri = pl.col("uris").list.first().struct.field("uri").alias("uri")
    videos = selection.catalog.scan("videos").select("video_id", "codec", "license", "source_url", uri)
    joined = sums.join(videos, on="video_id", how="left").drop("video_id").collect(engine="streaming")
    return joined.with_columns(_source(joined).alias("source"))


def _source(videos: pl.DataFrame) -> pl.Series:
    """The host of `source_url`, else of the address; of a local file, its folder below the one that all have in
    common."""
    remote = r"^([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)"
    host = pl.col("source_url").str.extract(remote, 2)
    scheme = pl.col("uri").str.extract(remote, 1)
    address = pl.col("uri").str.extract(remote, 2)
    web = pl.when(scheme.is_in(["http", "https"])).then(address).otherwise(scheme + "://" + address)
    folder = pl.when(scheme.is_null()).then(pl.col("uri").str.replace(r"/[^/]*$", ""))
    folders = videos.select(folder.alias("folder"))["folder"].drop_nulls()
    top = ""
    if len(folders):
        ends = [str(folders.min()), str(folders.max())]  # what the first and the last share, all between them share
        top = os.path.commonpath(ends) if ends[0].startswith("/") == ends[1].startswith("/") and all(ends) else ""
    below = folder.str.slice(len(top)).str.strip_chars_start("/").str.extract(r"^([^/]*)", 1)
    local = (
        pl.when(below == "").then(pl.lit(top or ".")).otherwise(pl.lit(f"{top.rstrip('/')}/" if top else "") + below)
    )
    return videos.select(pl.coalesce(host, web, local, pl.col("source_url"), pl.lit(UNKNOWN)))[:, 0]


def _reasons(clips: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    counted = (
        clips.group_by("status", "reasons").len().with_columns(pl.col("reasons").cast(pl.String).str.split(SEPARATOR))
    )
    one = pl.col("reasons").list.len() == 1

    def rules(status: str, *more: pl.Expr) -> pl.DataFrame:
        rows = counted.filter((pl.col("status") == status) & pl.col("reasons").is_not_null())
        rows = rows.with_columns(one.alias("one")).explode("reasons")
        rows = rows.filter(pl.col("reasons").str.len_bytes() > 0)
        sums = rows.group_by(pl.col("reasons").alias("rule")).agg(pl.col("len").sum().alias("clips"), *more)
        return sums.sort("clips", "rule", descending=[True, False])

    return rules("rejected", pl.col("len").filter("one").sum().alias("alone")), rules("pending")


def _kinds(clips: pl.DataFrame, by_video: pl.DataFrame) -> dict[str, pl.DataFrame]:
    rate = (
        pl.when(pl.col("fps").is_null())
        .then(pl.lit("none (image)"))
        .otherwise(pl.col("fps").cast(pl.String).str.replace(r"\.0$", ""))
    )
    sizes = [*(name for _, name in SHORT_SIDES), "≥ 2160", UNKNOWN]
    by_size = tally(clips, resolution_class())
    return {
        "Shorter side, px": by_size.sort(
            pl.col("name").replace_strict({name: i for i, name in enumerate(sizes)}, return_dtype=pl.Int32)
        ),
        "Aspect ratio": tally(clips, aspect_class()),
        "Frame rate, frames/s": tally(clips, rate),
        "Codec": tally(by_video, pl.col("codec").fill_null(UNKNOWN)),
        "Camera motion": tally(clips, pl.col("camera_motion").cast(pl.String).fill_null("not measured")),
    }


def _durations(span: pl.DataFrame) -> dict | None:
    return binned(span["seconds"].to_numpy(), span["kept"].to_numpy(), []) if span.height else None


@dataclass(frozen=True)
class Failure:
    """One kind of failure: how many, and some (address, message)."""

    kind: str
    count: int
    examples: list[tuple[str, str]]


def failures(selection: Selection) -> tuple[list[Failure], list[Failure]]:
    """Quarantine by kind: of videos (the whole catalog), of clips."""
    uri = pl.col("uris").list.first().struct.field("uri")
    videos = (
        selection.catalog.scan("videos")
        .filter(pl.col("status") == "quarantined")
        .select(
            pl.col("error_kind").fill_null(UNKNOWN).alias("kind"), uri.alias("where"), pl.col("error").alias("message")
        )
    )
    error = pl.col("errors").struct
    clips = (
        selection.rows(["errors", "uri", "start_s"])
        .filter(pl.col("errors").list.len() > 0)
        .explode("errors")
        .select(
            (error.field("stage") + ": " + error.field("kind").fill_null(UNKNOWN)).fill_null(UNKNOWN).alias("kind"),
            (
                pl.col("uri").fill_null("") + " at " + pl.col("start_s").round(1).cast(pl.String).fill_null("?") + " s"
            ).alias("where"),
            error.field("message").alias("message"),
        )
    )
    return _failures(videos), _failures(clips)


def _failures(rows: pl.LazyFrame) -> list[Failure]:
    some = pl.col("where", "message").fill_null("").head(EXAMPLES)
    counted = (
        rows.group_by("kind")
        .agg(pl.len(), some)
        .collect(engine="streaming")
        .sort("len", "kind", descending=[True, False])
    )
    return [Failure(kind, count, list(zip(places, messages))) for kind, count, places, messages in counted.iter_rows()]


@dataclass(frozen=True)
class Duplicates:
    """`looked`: clips that were compared; `groups` of more than one; `sizes`: clips in a group -> groups; `kinds` ->
    copies."""

    looked: int
    groups: int
    copies: int
    sizes: list[tuple[int, int]]
    kinds: list[tuple[str, int]]


def duplicates(selection: Selection) -> Duplicates:
    """What `datakit run dedup` found."""
    grouped = (
        selection.rows(["duplicate_group"])
        .filter(pl.col("duplicate_group").is_not_null())
        .group_by("duplicate_group")
        .len()
    )
    sizes = grouped.group_by(pl.col("len").alias("size")).len().collect(engine="streaming").sort("size")
    copies = selection.rows(["duplicate_of", "duplicate_kind"]).filter(pl.col("duplicate_of").is_not_null())
    kinds = (
        copies.group_by(pl.col("duplicate_kind").fill_null(UNKNOWN))
        .len()
        .collect(engine="streaming")
        .sort("len", descending=True)
    )
    several = sizes.filter(pl.col("size") > 1)
    return Duplicates(
        int((sizes["size"] * sizes["len"]).sum() or 0),
        int(several["len"].sum() or 0),
        int(kinds["len"].sum() or 0),
        list(several.iter_rows()),
        list(kinds.iter_rows()),
    )


def runs(selection: Selection) -> tuple[pl.DataFrame, list[tuple[str, float]]]:
    """Every run, newest first, and the CPU hours of each stage over all of them."""
    table = selection.catalog.scan("runs").sort("started_at", descending=True, nulls_last=True).collect()
    spent: dict[str, float] = {}
    for text in table["stage_cpu_s"].drop_nulls():
        for stage, cpu_s in json.loads(text).items():
            spent[stage] = spent.get(stage, 0.0) + cpu_s / 3600
    return table, sorted(spent.items(), key=lambda item: -item[1])


def decided_by(selection: Selection) -> list[str]:
    """Labels of the recipes whose decisions the catalog holds."""
    labels = selection.catalog.scan("decisions").select(pl.col("recipe").unique()).collect(engine="streaming")["recipe"]
    return labels.drop_nulls().sort().to_list()
