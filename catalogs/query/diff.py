"""`datakit catalog diff A B`: what changed between two snapshots."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import polars as pl

from catalogs.tables.arrow_types import view_schema
from catalogs.tables.catalog import Catalog

NOT_SCORES = {
    "stream",
    "start_frame",
    "end_frame",
    "level",
    "start_pts",
    "end_pts",
    "start_s",
    "end_s",
    "bit_depth",
    "rotation",
    "bit_rate",
}
TEXTS = ("camera_motion", "duplicate_of", "split")
EACH = ["clip_id", "status", "reasons", "start_s", "end_s"]


@dataclass(frozen=True)
class Drift:
    """How a column changed on clips that both snapshots have: values that appeared, went, differ; mean (of those that
    differ) and largest difference, for numbers."""

    filled: int
    cleared: int
    changed: int
    mean: float | None
    largest: float | None


@dataclass(frozen=True)
class Flip:
    """Clips whose status changed, and the rules that account for it: the reasons on the side where they are not
    kept."""

    before: str
    after: str
    clips: int
    hours: float
    rules: dict[str, int]


@dataclass(frozen=True)
class Diff:
    """Rows of B against A. Clips are compared by identity: other cuts of a video are other clips."""

    videos_added: int
    videos_removed: int
    clips_added: int
    clips_removed: int
    hours_added: float
    hours_removed: float
    flips: list[Flip]
    scores: dict[str, Drift]
    captions_added: int
    captions_removed: int
    captions_changed: int
    marks_changed: int
    recipes: tuple[list[str], list[str]]

    def as_dict(self) -> dict:
        return asdict(self)


def diff(catalog: Catalog, a: dict[str, int], b: dict[str, int]) -> Diff:
    """Compare two snapshots. Tables that did not change between them are not read.

    Args:
        a, b: versions of the tables (see `catalogs.query.snapshots.resolve`).
    """
    with catalog.at(a).reading(), catalog.at(b).reading():
        videos_added, videos_removed = (
            _added_removed(_videos(catalog, a), _videos(catalog, b), "video_id")
            if a["videos"] != b["videos"]
            else (0, 0)
        )
        clips_changed = a["clips"] != b["clips"] or a["videos"] != b["videos"]
        added, removed = _clips(catalog, a, b) if clips_changed else ((0, 0.0), (0, 0.0))
        same_captions = a["captions"] == b["captions"] and not clips_changed
        captions = (0, 0, 0) if same_captions else _captions(catalog, a, b)
        return Diff(
            videos_added,
            videos_removed,
            added[0],
            removed[0],
            added[1],
            removed[1],
            _flips(catalog, a, b),
            _drifts(catalog, a, b) if a["clips"] != b["clips"] or a["losses"] != b["losses"] else {},
            *captions,
            _marks(catalog, a, b) if a["marks"] != b["marks"] else 0,
            (_recipes(catalog, a), _recipes(catalog, b)),
        )


def scores() -> list[str]:
    """Numeric columns of the view that measure something."""
    return [name for name, kind in view_schema().items() if kind.is_numeric() and name not in NOT_SCORES]


def _videos(catalog: Catalog, versions: dict[str, int]) -> pl.LazyFrame:
    return catalog.scan("videos", versions["videos"]).filter(pl.col("status") == "ok").select("video_id")


def _added_removed(a: pl.LazyFrame, b: pl.LazyFrame, key: str) -> tuple[int, int]:
    added, removed = (x.join(y, on=key, how="anti").select(pl.len()).collect().item() for x, y in ((b, a), (a, b)))
    return added, removed


def _clips(catalog: Catalog, a: dict[str, int], b: dict[str, int]) -> tuple[tuple[int, float], tuple[int, float]]:
    one, other = (catalog.clips(v, ["clip_id", "start_s", "end_s"]) for v in (a, b))
    amount = [pl.len(), (pl.col("end_s") - pl.col("start_s")).sum().fill_null(0.0) / 3600]
    added, removed = (
        x.join(y, on="clip_id", how="anti").select(amount).collect().row(0) for x, y in ((other, one), (one, other))
    )
    return (added[0], added[1]), (removed[0], removed[1])


def _flips(catalog: Catalog, a: dict[str, int], b: dict[str, int]) -> list[Flip]:
    """From the pairs of statuses of clips that are in both."""
    one, other = catalog.clips(a, EACH), catalog.clips(b, ["clip_id", "status", "reasons"])
    both = one.join(other, on="clip_id", suffix="_b").filter(pl.col("status") != pl.col("status_b"))
    rules = pl.when(pl.col("status_b") == "kept").then("reasons").otherwise("reasons_b").alias("rules")
    changed = both.select("status", "status_b", rules, (pl.col("end_s") - pl.col("start_s")).alias("seconds")).collect()
    flips = []
    for (before, after), group in changed.group_by("status", "status_b"):
        named = (
            group.explode("rules")
            .drop_nulls("rules")
            .group_by("rules")
            .len()
            .sort("len", "rules", descending=[True, False])
        )
        flips.append(
            Flip(before, after, group.height, float(group["seconds"].sum() or 0.0) / 3600, dict(named.iter_rows()))
        )
    return sorted(flips, key=lambda flip: -flip.clips)


def _drifts(catalog: Catalog, a: dict[str, int], b: dict[str, int]) -> dict[str, Drift]:
    names = scores()
    columns = ["clip_id", *names, *TEXTS]
    both = catalog.clips(a, columns).join(catalog.clips(b, columns), on="clip_id", suffix="_b")
    asked = []
    for name in (*names, *TEXTS):
        x, y = pl.col(name), pl.col(f"{name}_b")
        gap = pl.lit(None, pl.Float64) if name in TEXTS else (y.cast(pl.Float64) - x.cast(pl.Float64)).abs()
        differs = x != y if name in TEXTS else gap > 0
        asked += [
            (x.is_null() & y.is_not_null()).sum().alias(f"{name} filled"),
            (x.is_not_null() & y.is_null()).sum().alias(f"{name} cleared"),
            differs.sum().alias(f"{name} changed"),
            gap.filter(differs).mean().alias(f"{name} mean"),
            gap.max().alias(f"{name} largest"),
        ]
    row = both.select(asked).collect(engine="streaming").row(0, named=True)
    drifts = {
        name: Drift(*(row[f"{name} {part}"] for part in ("filled", "cleared", "changed", "mean", "largest")))
        for name in (*names, *TEXTS)
    }
    return {name: drift for name, drift in drifts.items() if drift.filled or drift.cleared or drift.changed}


def _captions(catalog: Catalog, a: dict[str, int], b: dict[str, int]) -> tuple[int, int, int]:
    one, other = (catalog.captions(v).select("caption_id", "text") for v in (a, b))
    changed = one.join(other, on="caption_id", suffix="_b").filter(pl.col("text").ne_missing(pl.col("text_b")))
    return *_added_removed(one, other, "caption_id"), changed.select(pl.len()).collect().item()


def _marks(catalog: Catalog, a: dict[str, int], b: dict[str, int]) -> int:
    one, other = (catalog.marks(v).select("clip_id", "mark", "comment") for v in (a, b))
    both = one.join(other, on="clip_id", how="full", suffix="_b", coalesce=True)
    differs = pl.col("mark").ne_missing(pl.col("mark_b")) | pl.col("comment").ne_missing(pl.col("comment_b"))
    return both.filter(differs).select(pl.len()).collect().item()


def _recipes(catalog: Catalog, versions: dict[str, int]) -> list[str]:
    return (
        catalog.scan("decisions", versions["decisions"])
        .select("recipe")
        .unique()
        .sort("recipe")
        .collect()["recipe"]
        .to_list()
    )
