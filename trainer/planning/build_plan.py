"""Planning: from selections to the plan's folder. Reads catalogs, opens no video."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from catalogs.query.selection import Selection
from datakit.errors import ConfigError
from datakit.hashing import hash_hex
from datakit.video.color import COLOUR_VERSION
from datakit.video.sparse_reader import SCALER
from trainer.planning.bucket_assignment import Assignment, assign, first_frames
from trainer.planning.buckets import Table, bucket_table
from trainer.planning.mixture import COLUMNS, Member, repeats
from trainer.planning.plan import LEFT_OUT, ROWS, WINDOWS, Bucket, Part, Plan, check_target, write_plan
from trainer.planning.plan_html import picture
from trainer.planning.settings import PlanSettings
from trainer.planning.statistics import Counted, count, expected

ORDER = ("bucket", "video_id", "start_pts", "first", "part", "clip_id")
"""Of the windows. Clips of a video lie together, so that reading them is sequential."""
GEOMETRY = (
    "clip_id",
    "start_pts",
    "end_pts",
    "first",
    "frames",
    "stride",
    "millifps",
    "crop_x",
    "crop_y",
    "crop_width",
    "crop_height",
    "bucket_height",
    "bucket_width",
)
"""What decides the pixels of a window, besides how they are resized and converted."""


class NothingToPlan(ConfigError):
    """No clip of a selection can train."""


def make_plan(
    selections: Selection | Member | Sequence[Selection | Member],
    settings: PlanSettings,
    folder: str | Path,
    overwrite: bool = False,
) -> Plan:
    """Assign every clip of the selections to a bucket or to those left out, and write the plan.

    Args:
        selections: one, or several, mixed as `trainer.planning.mixture` says.
        folder: made whole or not at all.
        overwrite: replace another plan there.

    Raises:
        ConfigError: settings that make no sense, nothing that can train, or a folder that is something else.
        CatalogError: a catalog that cannot be read.
    """
    several = [selections] if isinstance(selections, (Selection, Member)) else selections
    members = [s if isinstance(s, Member) else Member(f"part {i + 1}", s) for i, s in enumerate(several)]
    check_target(Path(folder))
    table = bucket_table(settings)
    recorded = [m.selection.as_dict() for m in members]  # reads all rows for their hash, so before they are held below
    placed = [_place(member, table, settings) for member in members]
    windows = pl.concat([p.windows.with_columns(pl.lit(i, pl.Int32).alias("part")) for i, p in enumerate(placed)])
    counted = [Counted(m.name, p.clips, p.assignment, p.windows["row"].to_numpy()) for m, p in zip(members, placed)]
    _check(members, counted)
    windows, buckets = _used(windows, table.buckets)
    draws = [float(sum(buckets[b].weight * n for b, n in _per_bucket(windows, i))) for i in range(len(members))]
    parts = [Part(m.name, r, what, _address(m)) for m, r, what in zip(members, repeats(members, draws), recorded)]
    resolved = {
        **settings.model_dump(mode="json"),
        "budget": table.budget,
        "resize_filter": SCALER,
        "colour_version": COLOUR_VERSION,
    }
    global_batches = _global_batches(windows, buckets, parts, settings)
    counts = count(counted, windows, buckets, parts, global_batches, table, settings)
    page = picture(buckets, parts, counts, resolved)
    rows = pl.concat([p.rows.with_columns(pl.lit(_address(m)).alias("root")) for m, p in zip(members, placed)])
    offsets = np.cumsum([0, *(p.rows.height for p in placed)])
    return write_plan(
        folder,
        buckets,
        parts,
        resolved,
        global_batches,
        counts,
        _windows(windows.sort(ORDER), rows, offsets, buckets),
        _left_out(placed),
        page,
        overwrite,
    )


@dataclass(frozen=True)
class _Placed:
    """A member's clips by clip_id, where they went, and their windows: `row` (in `rows`), `bucket, first` and what
    sorts them."""

    rows: pl.DataFrame
    clips: pl.DataFrame
    assignment: Assignment
    windows: pl.DataFrame


def _address(member: Member) -> str:
    root = member.selection.catalog.root
    return os.path.abspath(root) if member.selection.catalog.is_local else root


def _place(member: Member, table: Table, settings: PlanSettings) -> _Placed:
    with member.selection.catalog.reading():
        rows = member.selection.rows(COLUMNS).collect()
    clips = rows.select(pl.exclude("uri", "path", "lost_start", "lost_end", "motion_vmaf", "time_base", "stream"))
    assignment = assign(clips, table, settings)
    trains = np.flatnonzero(assignment.bucket >= 0)
    by_time = (assignment.stride[trains] == 0) & clips["vfr"].fill_null(False).to_numpy()[trains]
    frames = np.where(clips["kind"] == "image", 1, clips["num_frames"].fill_null(0))[trains]
    clip, first = first_frames(assignment.windows[trains], assignment.needed[trains], frames, by_time)
    row = trains[clip]
    windows = clips.select("video_id", "start_pts", "clip_id")[row].with_columns(
        pl.Series("row", row, pl.UInt32),
        pl.Series("bucket", assignment.bucket[row], pl.Int32),
        pl.Series("first", first, pl.Int32),
        pl.Series("stride", assignment.stride[row], pl.Int32),
        pl.Series("fps", assignment.fps[row], pl.Float64),
    )
    return _Placed(rows, clips.drop("caption"), assignment, windows)


def _check(members: Sequence[Member], counted: Sequence[Counted]) -> None:
    """Every clip has a window or a reason; every member has windows."""
    for member, c in zip(members, counted):
        with_windows, left_out = c.with_windows, int(c.assignment.reasons.is_not_null().sum())
        if with_windows + left_out != c.clips.height or with_windows != int((c.assignment.bucket >= 0).sum()):
            raise AssertionError(f"{c.clips.height} clips, but {with_windows} with windows and {left_out} left out")
        if with_windows:
            continue
        where = f"{_address(member)} where {member.selection.where or 'anything'}"
        if c.clips.is_empty():
            raise NothingToPlan(f"nothing to plan: no clip of {where} is selected")
        why = "; ".join(f"{n}: {example}" for _, n, example in c.reasons()[:3])
        raise NothingToPlan(f"nothing to plan: none of the {c.clips.height} clips of {where} can train ({why})")


def _used(windows: pl.DataFrame, buckets: Sequence[Bucket]) -> tuple[pl.DataFrame, list[Bucket]]:
    """Buckets that have windows, and the windows with their new numbers."""
    used = np.unique(windows["bucket"].to_numpy())
    numbers = np.full(len(buckets), -1, np.int32)
    numbers[used] = np.arange(len(used))
    return windows.with_columns(pl.Series("bucket", numbers[windows["bucket"].to_numpy()], pl.Int32)), [
        buckets[i] for i in used
    ]


def _per_bucket(windows: pl.DataFrame, part: int) -> list[tuple[int, int]]:
    return windows.filter(pl.col("part") == part).group_by("bucket").len().sort("bucket").rows()


def _global_batches(
    windows: pl.DataFrame, buckets: Sequence[Bucket], parts: Sequence[Part], settings: PlanSettings
) -> int:
    """Micro-batches of an optimizer step: what comes nearest to the samples or tokens asked for."""
    epoch = expected(windows, buckets, parts, 1)
    if settings.global_batch is not None:
        return max(1, round(settings.global_batch * epoch.micro_batches / epoch.samples))
    if settings.global_tokens is not None:
        return max(1, round(settings.global_tokens * epoch.micro_batches / epoch.tokens))
    return 1


def _windows(
    windows: pl.DataFrame, rows: pl.DataFrame, offsets: np.ndarray, buckets: Sequence[Bucket]
) -> Iterator[pa.RecordBatch]:
    """The rows of `windows.arrow`, `ROWS` at a time."""
    shapes = pl.DataFrame(
        {
            "bucket_height": [b.height for b in buckets],
            "bucket_width": [b.width for b in buckets],
            "frames": [b.frames for b in buckets],
        }
    )
    for start in range(0, windows.height, ROWS):
        chunk = windows.slice(start, ROWS)
        clips = rows[offsets[chunk["part"].to_numpy()] + chunk["row"].to_numpy()]
        whole = (
            pl.col("crop_x").is_null()
            | pl.col("crop_y").is_null()
            | pl.col("crop_width").is_null()
            | pl.col("crop_height").is_null()
        )
        lost = pl.col("lost_start").fill_null(0) + pl.col("lost_end").fill_null(0)
        clips = clips.drop("fps").with_columns(
            # A stream copy that lacks frames of its clip is of no use: the source has them all.
            path=pl.when(lost == 0).then(pl.col("root") + "/" + pl.col("path")),
            crop_x=pl.when(whole).then(0).otherwise("crop_x"),
            crop_y=pl.when(whole).then(0).otherwise("crop_y"),
            crop_width=pl.when(whole).then("width").otherwise("crop_width"),
            crop_height=pl.when(whole).then("height").otherwise("crop_height"),
        )
        chosen = chunk.select("part", "bucket", "first", "stride", "fps")
        found = pl.concat([clips, chosen, shapes[chunk["bucket"].to_numpy()]], how="horizontal")
        yield from _as_batches(found.with_columns(_geometry(found)), WINDOWS)


def _geometry(windows: pl.DataFrame) -> pl.Series:
    """16 hex digits for every window."""
    keys = windows.with_columns(millifps=(pl.col("fps") * 1000).round().cast(pl.Int64)).select(
        pl.concat_str(GEOMETRY, separator="/")
    )
    how = f"/{SCALER}/{COLOUR_VERSION}"
    hashes = [hash_hex(key + how, 8, "datakit-geometry") for key in keys.to_series()]
    return pl.Series("geometry", hashes, pl.String)


def _left_out(placed: Sequence[_Placed]) -> Iterator[pa.RecordBatch]:
    for part, p in enumerate(placed):
        found = p.clips.select("clip_id", pl.lit(part, pl.Int32).alias("part"), p.assignment.reasons.alias("reason"))
        found = found.filter(pl.col("reason").is_not_null()).sort("clip_id")
        for start in range(0, found.height, ROWS):
            yield from _as_batches(found.slice(start, ROWS), LEFT_OUT)


def _as_batches(frame: pl.DataFrame, schema: pa.Schema) -> list[pa.RecordBatch]:
    """One batch (none, if there are no rows) of exactly these columns and types."""
    return frame.select(schema.names).to_arrow().cast(schema).combine_chunks().to_batches()
