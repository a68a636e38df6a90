"""What a training run found out about the clips: which kinds of them it finds hard, and which ones most of all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from catalogs.query.selection import Selection
from catalogs.records.losses import MEANS, NOISE_LEVELS
from catalogs.report.counts import ASPECTS, SHORT_SIDES, UNKNOWN, aspect_class, resolution_class
from datakit.errors import CatalogError

MOST = 12
"""Names of a slice that are shown, the most frequent ones."""
FEWEST = 5
"""Clips of which a slice is judged."""
SURE = 3.0
"""Standard errors from which a slice is called worse or better than all clips: with some 60 slices, chance gives one in
ten reports."""
NOT_MEASURED = "not measured"
DURATIONS = ((2, "< 2 s"), (4, "2 … 4 s"), (8, "4 … 8 s"))
LENGTHS = ((10, "1 … 9"), (30, "10 … 29"), (80, "30 … 79"), (150, "80 … 149"))
LEVELS = [f"{n / 10:.1f} … {(n + 1) / 10:.1f}" for n in range(NOISE_LEVELS)]
COLUMNS = (
    "clip_id",
    "camera_motion",
    "width",
    "height",
    "motion",
    "license",
    "source_url",
    "codec",
    "start_s",
    "end_s",
    "caption",
    "caption_style",
)


@dataclass(frozen=True)
class TrainedRun:
    """A run that the table `losses` knows; `pipeline` and `status` are empty where `runs` does not."""

    run_id: str
    pipeline: str
    status: str
    from_step: int
    to_step: int
    samples: int
    clips: int


@dataclass(frozen=True)
class Hard:
    """A clip, its mean excess (of `samples`), and its caption."""

    clip_id: str
    mean: float
    samples: int
    caption: str


@dataclass(frozen=True)
class Training:
    """Of one run, over the clips of a selection.

    Attributes:
        runs: all that have losses, the newest first; `run` is the one shown.
        clips, samples: that are counted; `mean` excess of these samples: below nothing while the loss falls.
        kinds: slices of clips, title -> name, clips, samples, mean, error. Mean is the excess of the samples over that
            of all; its standard error (null: a single clip) takes clips as independent, not samples.
        places: the same by bucket and by noise level, of plain excess: near nothing by construction, as excess is over
            the mean of exactly these.
        worse, better: of all kinds, those whose mean is off by more than `SURE` standard errors: slice, name, clips,
            samples, mean, error; the worst or best first.
        levels: bucket -> mean loss at each noise level as the run left it; empty: not recorded.
        worst, best: clips, the surest first, excess over that of all.
    """

    runs: list[TrainedRun]
    run: TrainedRun
    clips: int
    samples: int
    mean: float
    kinds: dict[str, pl.DataFrame]
    places: dict[str, pl.DataFrame]
    worse: pl.DataFrame
    better: pl.DataFrame
    levels: dict[str, list[float | None]]
    worst: list[Hard]
    best: list[Hard]


def training(selection: Selection, run: str | None, thumbnails: int) -> Training | None:
    """None: no run has entered losses.

    Args:
        run: id, or how it begins; None: the newest.
        thumbnails: as many best clips, and twice as many worst.

    Raises:
        CatalogError: no run of that name has losses, or several.
    """
    runs, counts = _runs(selection)
    if not runs:
        if run is not None:
            raise CatalogError(
                f"no run has entered losses in {selection.catalog.root}, so there is none of {run} to show"
            )
        return None
    chosen = _chosen(runs, run)
    mine = selection.catalog.scan("losses").filter((pl.col("run_id") == chosen.run_id) & pl.col("excess").is_finite())
    sums = mine.group_by("clip_id").agg(pl.col("excess", "count").sum())
    rows = _columns(selection).join(sums, on="clip_id", how="inner").collect(engine="streaming")
    samples = int(rows["count"].sum())
    mean = rows["excess"].sum() / samples if samples else 0.0
    samples_of = _of_samples(mine, rows)
    rows = rows.with_columns(pl.col("excess") - mean * pl.col("count"))
    kinds, places = (
        {title: frame for title, frame in found.items() if frame.height > 1} for found in (_of_clips(rows), samples_of)
    )
    worse, better = _off(kinds)
    worst, best = _extremes(rows, thumbnails)
    captions = _captions(selection, [*worst["clip_id"], *best["clip_id"]])
    levels = json.loads(counts.get(chosen.run_id) or "{}").get(MEANS, {})
    return Training(
        runs,
        chosen,
        rows.height,
        samples,
        mean,
        kinds,
        places,
        worse,
        better,
        levels,
        _hard(worst, captions),
        _hard(best, captions),
    )


def _runs(selection: Selection) -> tuple[list[TrainedRun], dict[str, str]]:
    """The newest first; and the recorded counts of each."""
    facts = [
        pl.col("from_step").min(),
        pl.col("to_step").max(),
        pl.col("count").sum(),
        pl.col("clip_id").n_unique().alias("clips"),
    ]
    found = selection.catalog.scan("losses").group_by("run_id").agg(facts).collect(engine="streaming")
    known = selection.catalog.scan("runs").select("run_id", "pipeline", "status", "started_at", "counts").collect()
    rows = found.join(known, on="run_id", how="left").sort(
        "started_at", "run_id", descending=[True, False], nulls_last=True
    )
    runs = [
        TrainedRun(
            r["run_id"] or "",
            r["pipeline"] or "",
            r["status"] or "",
            r["from_step"] or 0,
            r["to_step"] or 0,
            r["count"],
            r["clips"],
        )
        for r in rows.iter_rows(named=True)
    ]
    return runs, {r["run_id"]: r["counts"] for r in rows.iter_rows(named=True) if r["counts"]}


def _chosen(runs: Sequence[TrainedRun], run: str | None) -> TrainedRun:
    named = [r for r in runs if run is None or r.run_id.startswith(run)]
    exact = [r for r in named if r.run_id == run]
    if not named or (run is not None and not exact and len(named) > 1):
        what = f"several runs begin with {run}" if named else f"no run {run} has entered losses"
        raise CatalogError(f"{what}: there are {', '.join(r.run_id for r in (named or runs)[:10])}")
    return (exact or named)[0]


def _columns(selection: Selection) -> pl.LazyFrame:
    """What slices are made of; of captions only their length."""
    words = pl.col("caption").str.count_matches(r"\S+").alias("words")
    return selection.rows(COLUMNS).select(*(c for c in COLUMNS if c != "caption"), words)


def _of_clips(rows: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """Slices by kinds of clips; those with an order of their own keep it."""
    length = _classes(pl.col("end_s") - pl.col("start_s"), DURATIONS, "≥ 8 s", UNKNOWN)
    words = _classes(pl.col("words"), LENGTHS, "≥ 150", "none")
    thirds, of_motion = _thirds("motion", rows)
    ordered = {
        "Motion, thirds": (thirds, of_motion),
        "Shorter side, px": (resolution_class(), [*(name for _, name in SHORT_SIDES), "≥ 2160", UNKNOWN]),
        "Aspect ratio": (aspect_class(), [*(name for name, _ in ASPECTS), "other", UNKNOWN]),
        "Duration": (length, [*(name for _, name in DURATIONS), "≥ 8 s", UNKNOWN]),
        "Caption length, words": (words, [*(name for _, name in LENGTHS), "≥ 150", "none"]),
    }
    named = {
        "Caption style": pl.col("caption_style").fill_null("none"),
        "Camera motion": pl.col("camera_motion").fill_null(NOT_MEASURED),
        "Source": pl.coalesce(pl.col("source_url").str.extract(r"://([^/?#]*)", 1), pl.lit(UNKNOWN)),
        "Licence": pl.col("license").fill_null(UNKNOWN),
        "Codec": pl.col("codec").fill_null(UNKNOWN),
    }
    return {title: sliced(rows, name, order) for title, (name, order) in ordered.items()} | {
        title: sliced(rows, name) for title, name in named.items()
    }


def _of_samples(mine: pl.LazyFrame, rows: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """By bucket and by noise level: a clip is in several."""
    some = mine.join(rows.lazy().select("clip_id"), on="clip_id", how="semi")
    found = {}
    for title, name, order in (
        ("Bucket", pl.col("bucket").fill_null(UNKNOWN), None),
        (
            "Noise level",
            pl.col("noise_level").replace_strict(dict(enumerate(LEVELS)), default=UNKNOWN),
            [*LEVELS, UNKNOWN],
        ),
    ):
        sums = (
            some.group_by("clip_id", name.alias("place"))
            .agg(pl.col("excess", "count").sum())
            .collect(engine="streaming")
        )
        found[title] = sliced(sums, pl.col("place"), order)
    return found


def _thirds(column: str, rows: pl.DataFrame) -> tuple[pl.Expr, list[str]]:
    """Thirds of the clips by a score; equal scores are in one of them."""
    have = rows[column].drop_nulls()
    if have.is_empty():
        return pl.lit(NOT_MEASURED), [NOT_MEASURED]
    one, two = have.quantile(1 / 3, "higher"), have.quantile(2 / 3, "higher")
    names = [f"low: below {one:.3g}", f"middle: {one:.3g} … {two:.3g}", f"high: from {two:.3g}"]
    value = pl.col(column)
    label = pl.when(value.is_null()).then(pl.lit(NOT_MEASURED)).when(value < one).then(pl.lit(names[0]))
    return label.when(value < two).then(pl.lit(names[1])).otherwise(pl.lit(names[2])), [*names, NOT_MEASURED]


def _classes(value: pl.Expr, limits: Sequence[tuple[float, str]], beyond: str, missing: str) -> pl.Expr:
    label = pl.when(value.is_null()).then(pl.lit(missing))
    for limit, name in limits:
        label = label.when(value < limit).then(pl.lit(name))
    return label.otherwise(pl.lit(beyond))


def sliced(rows: pl.DataFrame, name: pl.Expr, order: Sequence[str] | None = None) -> pl.DataFrame:
    """Sums by name. The mean m = Σe / Σn is a ratio over clips: its variance is k / (k - 1) · Σ(e - m·n)² / (Σn)² for k
    clips (Cochran, Sampling Techniques, 1977, chapter 6).

    Args:
        rows: excess and count of clips.
        order: of the names; None: the worst first.
    """
    e, n, k = pl.col("excess"), pl.col("count"), pl.len()
    mean = e.sum() / n.sum()
    spread = ((e - mean * n).pow(2).sum() * k / (k - 1)).sqrt() / n.sum()
    found = rows.group_by(name.alias("name")).agg(
        k.alias("clips"), n.sum().alias("samples"), mean.alias("mean"), pl.when(k > 1).then(spread).alias("error")
    )
    found = found.sort("clips", "name", descending=[True, False]).head(MOST)
    if order is None:
        return found.sort("mean", "name", descending=[True, False])
    return found.sort(pl.col("name").replace_strict({name: i for i, name in enumerate(order)}, return_dtype=pl.Int32))


def _off(kinds: dict[str, pl.DataFrame]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The slices of clips that are surely worse, and surely better, than all clips."""
    types = {
        "slice": pl.String,
        "name": pl.String,
        "clips": pl.UInt32,
        "samples": pl.Int64,
        "mean": pl.Float64,
        "error": pl.Float64,
    }
    named = [frame.select(pl.lit(title).alias("slice"), *list(types)[1:]).cast(types) for title, frame in kinds.items()]
    every = pl.concat([pl.DataFrame(schema=types), *named])
    far = pl.col("mean") / pl.col("error")
    enough = every.filter((pl.col("clips") >= FEWEST) & (pl.col("error") > 0))
    return enough.filter(far > SURE).sort("mean", descending=True), enough.filter(far < -SURE).sort("mean")


def _extremes(rows: pl.DataFrame, count: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Twice as many of the worst as of the best. A mean of n samples is known √n times as well as one of a single
    sample."""
    sure = rows.select("clip_id", "excess", "count", sure=pl.col("excess") / pl.col("count").sqrt())
    worst = sure.filter(pl.col("sure") > 0).sort("sure", "clip_id", descending=[True, False]).head(2 * count)
    return worst, sure.filter(pl.col("sure") < 0).sort("sure", "clip_id").head(count)


def _captions(selection: Selection, clip_ids: list[str]) -> dict[str, str]:
    if not clip_ids:
        return {}
    found = selection.rows(["clip_id", "caption"]).filter(pl.col("clip_id").is_in(clip_ids)).collect(engine="streaming")
    return {clip_id: caption or "" for clip_id, caption in found.iter_rows()}


def _hard(rows: pl.DataFrame, captions: dict[str, str]) -> list[Hard]:
    return [
        Hard(clip_id, excess / count, count, captions.get(clip_id, ""))
        for clip_id, excess, count in rows.select("clip_id", "excess", "count").iter_rows()
    ]
