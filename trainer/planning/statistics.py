"""What a plan holds, in numbers: clips, windows, hours, steps, cost, waste. It is printed, drawn, and stored in
`plan.json`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl

from trainer.planning.bucket_assignment import Assignment
from trainer.planning.buckets import Table
from trainer.planning.memory_budget import cost
from trainer.planning.plan import Bucket, Part
from trainer.planning.settings import PlanSettings

FRAME_S = pl.when(pl.col("fps") > 0).then(1 / pl.col("fps")).otherwise(0.0)
"""Seconds that a frame of a window stands for; images have no length."""


@dataclass(frozen=True)
class Counted:
    """What became of a part's clips. `rows`: of `clips`, for every window."""

    name: str
    clips: pl.DataFrame
    assignment: Assignment
    rows: np.ndarray

    @cached_property
    def with_windows(self) -> int:
        return len(np.unique(self.rows))

    def reasons(self) -> list[tuple[str, int, str]]:
        """(kind, clips, an example) of those left out, the most frequent first. The kind is what stands before the
        colon."""
        found = pl.DataFrame({"reason": self.assignment.reasons}).drop_nulls()
        kinds = found.with_columns(kind=pl.col("reason").str.split(":").list.first())
        kinds = kinds.group_by("kind").agg(pl.len(), pl.col("reason").min())
        return kinds.sort(["len", "kind"], descending=[True, False]).rows()


@dataclass(frozen=True)
class Epoch:
    """What an epoch is expected to be: averages, where a window is not drawn a whole number of times.

    Attributes:
        samples: windows drawn.
        hours: of the footage that they show.
        tokens: video and text.
    """

    samples: float
    hours: float
    tokens: float
    micro_batches: int
    steps: int


def expected(windows: pl.DataFrame, buckets: Sequence[Bucket], parts: Sequence[Part], global_batches: int) -> Epoch:
    """An epoch of windows (`part, bucket, fps`) drawn `part.weight · bucket.weight` times each."""
    draws = _draws(windows, buckets, parts)
    batches = [math.ceil(round(n / b.batch, 9)) for n, b in zip(draws["samples"], buckets)]
    full = sum(n // global_batches for n in batches)
    rest = sum(n % global_batches for n in batches)
    tokens = float(sum(n * b.tokens for n, b in zip(draws["samples"], buckets)))
    return Epoch(
        float(draws["samples"].sum()),
        float(draws["hours"].sum()),
        tokens,
        sum(batches),
        full + math.ceil(rest / global_batches),
    )


def count(
    counted: Sequence[Counted],
    windows: pl.DataFrame,
    buckets: Sequence[Bucket],
    parts: Sequence[Part],
    global_batches: int,
    table: Table,
    settings: PlanSettings,
) -> dict[str, Any]:
    """Everything, as plain values.

    Args:
        windows: `part, row, clip_id, bucket, fps`, a row each.
        buckets: those that have windows, as the windows number them.
        table: all there could be.
    """
    epoch = expected(windows, buckets, parts, global_batches)
    rows = _buckets(counted, windows, buckets, parts, settings, global_batches)
    return {
        "parts": _parts(counted, windows, buckets, parts, epoch),
        "buckets": rows,
        "epoch": {**asdict(epoch), "global_batches": global_batches},
        "step": {"samples": epoch.samples / epoch.steps, "tokens": epoch.tokens / epoch.steps},
        "balance": _balance(rows, buckets, settings),
        "left_out": _left_out(counted),
        "statuses": _statuses(counted),
        "in_several_parts": _in_several(counted),
        "too_large": [{"name": name, "tokens": tokens} for name, tokens in table.too_large],
    }


def _draws(windows: pl.DataFrame, buckets: Sequence[Bucket], parts: Sequence[Part]) -> pl.DataFrame:
    """`samples, hours` of every bucket in an epoch."""
    found = (
        windows.group_by("part", "bucket")
        .agg(pl.len().alias("windows"), FRAME_S.sum().alias("frame_s"))
        .sort("part", "bucket")
    )
    samples, seconds = np.zeros(len(buckets)), np.zeros(len(buckets))
    for part, bucket, n, frame_s in found.iter_rows():
        times = parts[part].weight * buckets[bucket].weight
        samples[bucket] += times * n
        seconds[bucket] += times * frame_s * buckets[bucket].frames
    return pl.DataFrame({"samples": samples, "hours": seconds / 3600})


def _buckets(
    counted: Sequence[Counted],
    windows: pl.DataFrame,
    buckets: Sequence[Bucket],
    parts: Sequence[Part],
    settings: PlanSettings,
    global_batches: int,
) -> list[dict[str, Any]]:
    """A row for each bucket.

    `steps`: of an epoch; a step that several buckets share counts in parts. `crop`: mean share of the picture that is
        cut off.
    `used`: source frames from a window's first to its last, over all frames of its clips. `fill`: samples over the
        places in
    micro-batches.
    """
    samples = _draws(windows, buckets, parts)["samples"].to_list()
    spent = [n * cost(b.tokens, settings.memory) for n, b in zip(samples, buckets)]
    own = windows.group_by("bucket").agg(
        pl.len().alias("windows"), FRAME_S.sum().alias("frame_s"), pl.struct("part", "row").n_unique().alias("clips")
    )
    used = (pl.col("taken").sum() / pl.col("has").sum()).alias("used")
    waste = _facts(counted, windows).group_by("bucket").agg(pl.col("crop").mean(), used)
    rows = []
    for i, (b, row) in enumerate(zip(buckets, own.join(waste, on="bucket").sort("bucket").iter_rows(named=True))):
        batches = math.ceil(round(samples[i] / b.batch, 9))
        rows.append(
            {
                "name": b.name,
                "clips": row["clips"],
                "windows": row["windows"],
                "hours": row["frame_s"] * b.frames / 3600,
                "batch": b.batch,
                "tokens": b.tokens,
                "samples": samples[i],
                "micro_batches": batches,
                "steps": batches / global_batches,
                "fill": samples[i] / (batches * b.batch),
                "crop": row["crop"],
                "used": row["used"],
                "cost_share": spent[i] / sum(spent),
            }
        )
    return rows


def _facts(counted: Sequence[Counted], windows: pl.DataFrame) -> pl.DataFrame:
    """`bucket, crop, taken, has` of every clip with windows."""
    found = []
    for part, c in enumerate(counted):
        rows, n = np.unique(c.rows, return_counts=True)
        numbers = windows.filter(pl.col("part") == part).select("row", "bucket").unique("row").sort("row")["bucket"]
        has = np.maximum(c.clips["num_frames"].fill_null(1).to_numpy()[rows], 1)
        found.append(
            pl.DataFrame(
                {
                    "bucket": numbers,
                    "crop": c.assignment.crop[rows],
                    "taken": n * c.assignment.needed[rows],
                    "has": has.astype(np.int64),
                }
            )
        )
    return pl.concat(found)


def _parts(
    counted: Sequence[Counted], windows: pl.DataFrame, buckets: Sequence[Bucket], parts: Sequence[Part], epoch: Epoch
) -> list[dict[str, Any]]:
    """A row for each selection. `epochs`: how often a window of it is seen in an epoch, on average over its buckets."""
    rows = []
    for index, (c, part) in enumerate(zip(counted, parts)):
        own = windows.filter(pl.col("part") == index)
        samples = expected(own, buckets, parts, 1).samples
        rows.append(
            {
                "name": part.name,
                "catalog": part.catalog,
                "where": part.selection["where"],
                "clips": c.clips.height,
                "trained": c.with_windows,
                "left_out": c.clips.height - c.with_windows,
                "windows": own.height,
                "repeat": part.weight,
                "samples": samples,
                "share": samples / epoch.samples,
                "epochs": samples / own.height,
            }
        )
    return rows


def _balance(
    rows: Sequence[dict[str, Any]], buckets: Sequence[Bucket], settings: PlanSettings
) -> dict[str, dict[str, float]]:
    """Over full micro-batches: tokens, and computation relative to the mean."""
    n = np.array([r["micro_batches"] for r in rows], float)
    tokens = np.array([b.batch * b.tokens for b in buckets], float)
    flops = np.array([b.batch * cost(b.tokens, settings.memory) for b in buckets])
    found = {}
    for name, values in (("tokens", tokens), ("cost", flops / (np.average(flops, weights=n) if n.sum() else 1))):
        mean = float(np.average(values, weights=n))
        spread = float(np.sqrt(np.average((values - mean) ** 2, weights=n)))
        found[name] = {"least": float(values.min()), "mean": mean, "most": float(values.max()), "spread": spread / mean}
    return found


def _left_out(counted: Sequence[Counted]) -> list[dict[str, Any]]:
    """Kinds of reasons, the most frequent first."""
    together: dict[str, dict[str, Any]] = {}
    for c in counted:
        for kind, n, example in c.reasons():
            row = together.setdefault(kind, {"kind": kind, "clips": 0, "example": example})
            row["clips"] += n
    return sorted(together.values(), key=lambda row: (-row["clips"], row["kind"]))


def _statuses(counted: Sequence[Counted]) -> dict[str, int]:
    """Clips with windows by status: rejected ones train where the condition selects them."""
    found: dict[str, int] = {}
    for c in counted:
        trained = c.clips["status"].gather(np.unique(c.rows)).fill_null("pending")
        for status, n in trained.value_counts().sort("status").iter_rows():
            found[status] = found.get(status, 0) + n
    return found


def _in_several(counted: Sequence[Counted]) -> int:
    """Clips that train in more than one part."""
    if len(counted) < 2:
        return 0
    ids = pl.concat([c.clips["clip_id"].gather(np.unique(c.rows)) for c in counted])
    return int(len(ids) - ids.n_unique())
