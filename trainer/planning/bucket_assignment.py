"""Which bucket every clip goes to, or why it cannot train. Works on whole columns: a million clips take a second or
two.

A clip goes to the largest resolution that its picture (inside black borders) reaches without being enlarged by more
than `max_upscale`, in the size of it that cuts off least and at most `max_crop`; there to the longest window that it
fills. A clip that fills none there goes on to the next lower resolution.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from datakit.hashing import uniform
from trainer.planning.buckets import Length, Level, Table
from trainer.planning.frame_rate import frame_rates, frames_needed
from trainer.planning.settings import PlanSettings

EXACT = 1e-9
"""Slack for limits that are met exactly: 4:3 in 16:9 loses exactly a quarter."""


@dataclass(frozen=True)
class Assignment:
    """Of every clip, in the order given.

    Attributes:
        bucket: index in the table, -1: left out. int32 [clips].
        stride, fps: see `trainer.planning.plan.WINDOWS`. int64, float64 [clips].
        needed: source frames of a window, first to last. int64 [clips].
        windows: how many. int64 [clips].
        crop: share of the picture's area that the bucket's shape cuts off. float64 [clips].
        reasons: words, null where there is a bucket.
    """

    bucket: np.ndarray
    stride: np.ndarray
    fps: np.ndarray
    needed: np.ndarray
    windows: np.ndarray
    crop: np.ndarray
    reasons: pl.Series


@dataclass
class _Search:
    """What is known of the clips as levels are tried, largest first; arrays [clips]."""

    ids: pl.Series
    width: np.ndarray
    height: np.ndarray
    image: np.ndarray
    frames: np.ndarray
    native: np.ndarray
    stride: np.ndarray
    fps: np.ndarray
    open: np.ndarray  # neither placed nor barred
    bucket: np.ndarray
    needed: np.ndarray
    crop: np.ndarray
    single: np.ndarray  # a video that gives pictures
    least_crop: np.ndarray
    least_scale: np.ndarray
    shortest: np.ndarray  # frames of the shortest window at a level that it reaches; 0: none
    drawn: np.ndarray  # it could have gone somewhere, by keep probability it did not


def assign(clips: pl.DataFrame, table: Table, settings: PlanSettings) -> Assignment:
    """Place clips.

    Args:
        clips: `clip_id, kind, fps, vfr, num_frames, width, height, crop_width, crop_height, caption, split, status`.
    """
    barred = clips.select(_barred(settings))["reason"]
    search = _begin(clips, barred.is_null().to_numpy(), settings)
    for level in table.levels:
        _try(search, level, settings)
    placed = search.bucket >= 0
    windows = np.where(placed, np.minimum(settings.windows, search.frames // np.maximum(search.needed, 1)), 0)
    vfr = _even(clips).to_numpy()
    windows = np.where(placed & (search.image | vfr & ~search.single), 1, windows)
    reasons = barred.zip_with(barred.is_not_null(), _reasons(search, placed, settings, table))
    return Assignment(search.bucket, search.stride, search.fps, search.needed, windows, search.crop, reasons)


def first_frames(
    windows: np.ndarray, needed: np.ndarray, frames: np.ndarray, by_time: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Where windows begin: spread evenly from the first frame to the last; a single one lies in the middle.

    Args:
        windows, needed: of clips with at least one window.
        frames: that the clips have.
        by_time: clips whose frames come unevenly: where their middle lies is not known before they are read, so their
            one window begins with the clip.

    Returns:
        for every window the index of its clip, and that of its first frame inside the clip.
    """
    clip = np.repeat(np.arange(len(windows)), windows)
    position = np.arange(len(clip)) - np.repeat(np.cumsum(windows) - windows, windows)
    spare = (frames - needed)[clip]
    spread = position * spare // np.maximum(windows[clip] - 1, 1)
    return clip, np.where(by_time[clip], 0, np.where(windows[clip] == 1, spare // 2, spread))


def _even(clips: pl.DataFrame) -> pl.Series:
    """Whether a clip's frames come at a variable rate."""
    return clips["vfr"].fill_null(False)


def _barred(settings: PlanSettings) -> pl.Expr:
    """What keeps a clip out whatever its shape is."""
    split = pl.col("split").fill_null("train")
    video = pl.col("kind") != "image"
    reason = pl.when(pl.col("status") == "quarantined").then(pl.lit("quarantined: processing failed on it"))
    reason = reason.when(split != settings.split).then(pl.format("split: it belongs to {}", split))
    if settings.captions == "required":
        empty = pl.col("caption").is_null() | (pl.col("caption").str.strip_chars() == "")
        reason = reason.when(empty).then(
            pl.lit("no caption: `datakit run caption` writes them, plan.captions=optional does without")
        )
    sized = [(pl.col(f"crop_{side}").fill_null(pl.col(side)) > 0).fill_null(False) for side in ("width", "height")]
    reason = reason.when(~pl.all_horizontal(sized)).then(
        pl.lit("unknown size: the catalog has no width and height of it")
    )
    timed = (pl.col("fps") > 0).fill_null(False) & (pl.col("num_frames") > 0).fill_null(False)
    return (
        reason.when(video & ~timed)
        .then(pl.lit("unknown frame rate: the catalog has no fps and frame count of it"))
        .alias("reason")
    )


def _begin(clips: pl.DataFrame, open_: np.ndarray, settings: PlanSettings) -> _Search:
    image = (clips["kind"] == "image").to_numpy()
    native = np.where(image | ~open_, 1.0, clips["fps"].fill_null(1.0).fill_nan(1.0).to_numpy())
    stride, fps = frame_rates(native, _even(clips).to_numpy(), settings.fps, settings.time_error)
    n = clips.height
    return _Search(
        ids=clips["clip_id"],
        image=image,
        native=native,
        open=open_.copy(),
        width=clips["crop_width"].fill_null(clips["width"]).fill_null(0).to_numpy().astype(float),
        height=clips["crop_height"].fill_null(clips["height"]).fill_null(0).to_numpy().astype(float),
        frames=np.where(image, 1, clips["num_frames"].fill_null(0).to_numpy()).astype(np.int64),
        stride=np.where(image, 1, stride),
        fps=np.where(image, 0.0, fps),
        bucket=np.full(n, -1, np.int32),
        needed=np.zeros(n, np.int64),
        crop=np.zeros(n),
        single=np.zeros(n, bool),
        least_crop=np.full(n, np.inf),
        least_scale=np.full(n, np.inf),
        shortest=np.zeros(n, np.int64),
        drawn=np.zeros(n, bool),
    )


def _try(s: _Search, level: Level, settings: PlanSettings) -> None:
    """Place what is still open and fits a level."""
    size, crop, scale = _nearest_size(level, s.width, s.height)
    shape = crop <= settings.max_crop + EXACT
    s.least_crop = np.minimum(s.least_crop, crop)
    s.least_scale = np.where(shape, np.minimum(s.least_scale, scale), s.least_scale)
    reached = s.open & shape & (scale <= settings.max_upscale + EXACT)
    taken = np.zeros(len(s.open), bool)
    for length in level.lengths:
        if length.frames == 1:
            suits = s.image | settings.images_from_video
            needed = np.ones(len(s.open), np.int64)
        else:
            suits, needed = ~s.image, frames_needed(length.frames, s.stride, s.fps, s.native)
        bucket = np.array(length.buckets, np.int32)[size]
        able = reached & ~taken & suits & (bucket >= 0)
        s.shortest = np.where(
            able, np.where(s.shortest > 0, np.minimum(s.shortest, length.frames), length.frames), s.shortest
        )
        able &= needed <= s.frames
        taken_now = able & _kept(s, able, length.keep_frames, f"{level.name}x{length.frames}", settings.seed)
        kept = taken_now & _kept(s, taken_now, length.keep, level.name, settings.seed)
        s.drawn |= able & ~kept
        _place(s, kept, bucket, needed, crop, length)
        taken |= taken_now


def _place(
    s: _Search, which: np.ndarray, bucket: np.ndarray, needed: np.ndarray, crop: np.ndarray, length: Length
) -> None:
    s.bucket[which], s.needed[which], s.crop[which] = bucket[which], needed[which], crop[which]
    s.open &= ~which
    if length.frames == 1:
        s.single |= which & ~s.image
        s.stride[which], s.fps[which] = 1, 0.0


def _nearest_size(level: Level, width: np.ndarray, height: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the size that cuts off least: its index, the share of the area cut off, the factor a side is enlarged by."""
    best, crop, scale = np.zeros(len(width), np.int64), np.full(len(width), np.inf), np.full(len(width), np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        for index, (h, w) in enumerate(level.sizes):
            across, down = w / width, h / height
            lost = 1 - np.minimum(across, down) / np.maximum(across, down)
            nearer = lost < crop - EXACT
            best[nearer], crop[nearer], scale[nearer] = index, lost[nearer], np.maximum(across, down)[nearer]
    return best, crop, scale


def _kept(s: _Search, which: np.ndarray, probability: float, name: str, seed: int) -> np.ndarray:
    """Draws of a clip at a level or length, fixed by its id: bool [clips]."""
    if probability >= 1:
        return np.ones(len(which), bool)
    kept = np.zeros(len(which), bool)
    rows = np.flatnonzero(which)
    kept[rows] = [uniform(f"{seed}/{name}/{clip_id}", byteorder="big") < probability for clip_id in s.ids.gather(rows)]
    return kept


def _reasons(s: _Search, placed: np.ndarray, settings: PlanSettings, table: Table) -> pl.Series:
    """Why a clip that nothing bars has no bucket."""
    shape = np.isfinite(s.least_scale)
    reached = shape & (s.least_scale <= settings.max_upscale + EXACT)
    needed = _shortest_needed(s)
    known = pl.DataFrame(
        {
            "placed": placed,
            "shape": shape,
            "reached": reached,
            "drawn": s.drawn,
            "image": s.image,
            "shortest": s.shortest,
            "needed": needed,
            "frames": s.frames,
            "fps": np.round(s.fps, 2),
            "has_s": np.round(s.frames / s.native, 2),
            "needs_s": np.round(needed / s.native, 2),
            "width": s.width.astype(np.int64),
            "height": s.height.astype(np.int64),
            "scale": np.where(shape, np.round(s.least_scale, 2), 0),
            "crop": np.where(np.isfinite(s.least_crop), np.round(100 * s.least_crop, 1), 0),
        }
    )
    aspect = pl.format(
        f"aspect: {{}}x{{}} would lose {{}} % of its picture in the nearest shape, at most "
        f"{100 * settings.max_crop:g} % may go",
        "width",
        "height",
        "crop",
    )
    small = pl.format(
        f"too small: {{}}x{{}} would be enlarged {{}} times for the smallest bucket, at most "
        f"{settings.max_upscale:g} times is allowed",
        "width",
        "height",
        "scale",
    )
    short = pl.format(
        "too short: {} frames at {} frames/s need {} s ({} source frames), it has {} s ({})",
        "shortest",
        "fps",
        "needs_s",
        "needed",
        "has_s",
        "frames",
    )
    none = (
        pl.when("image")
        .then(pl.lit("no bucket for images: none of its size has one frame"))
        .otherwise(
            pl.lit(
                f"no bucket for videos: none of its size has more than one frame and fits the budget of "
                f"{table.budget} tokens"
            )
        )
    )
    reason = pl.when("placed").then(None).when(~pl.col("shape")).then(aspect).when(~pl.col("reached")).then(small)
    reason = reason.when("drawn").then(pl.lit("keep probability: drawn for no bucket"))
    reason = reason.when(pl.col("shortest") > 0).then(short).otherwise(none)
    return known.select(reason.alias("reason"))["reason"]


def _shortest_needed(s: _Search) -> np.ndarray:
    """Source frames that the shortest window within reach takes. int64 [clips]."""
    needed = np.zeros(len(s.shortest), np.int64)
    for frames in np.unique(s.shortest[s.shortest > 0]):
        needed = np.where(s.shortest == frames, frames_needed(int(frames), s.stride, s.fps, s.native), needed)
    return needed
