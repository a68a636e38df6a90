"""What the report says about scores: distributions, what lies either side of a threshold, densities, extreme clips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from catalogs.report.thresholds import Threshold
from catalogs.tables.schema import SCORES, VIEW_ADDED
from datakit.columns import Column

BINS = 48
ROBUST = 0.001
"""Share of values at either end that a histogram leaves out, so that a few wild ones do not squeeze the others."""
HEAVY_TAIL = 8.0
"""Ratio of the 99.9 % quantile to the median from which an axis is logarithmic."""
ZERO_SHARE = 0.3
"""Share of exact zeros from which they are told in words and not drawn: their bar would flatten all others."""
WHOLE_ZERO_SHARE = 0.6
"""The same for counts, where 0 is as good a number as any."""
LONGEST_STRETCH = 1.6
"""How far a linear axis grows, at most, to show a threshold."""


def score_columns() -> list[Column]:
    """Every numeric score that is shown, and the training loss."""
    return [*(c for c in SCORES if c.is_number and c.shown), *(c for c in VIEW_ADDED if c.name == "loss")]


@dataclass(frozen=True)
class Side:
    """Clips either side of one threshold."""

    threshold: Threshold
    passing: int
    failing: int


@dataclass(frozen=True)
class Picks:
    """A row of a contact sheet.

    Attributes:
        clips: (clip id, score, whether the threshold keeps it (None: no threshold)).
        tied: clips that share the score of the last one shown, where that leaves the choice open; else 0.
    """

    label: str
    clips: list[tuple[str, float, bool | None]]
    tied: int = 0


@dataclass(frozen=True)
class Distribution:
    """One score over the clips that have it.

    Attributes:
        edges: of the bins, in units of the score, or of its logarithm to base 10 where `log`.
        kept, other: clips in each bin, by whether they are kept.
        below, above: clips beyond the edges.
        zeros: clips with exactly 0 that are in no bin.
        quantiles: at 5, 50 and 95 %.
    """

    column: Column
    measured: int
    missing: int
    log: bool
    edges: list[float]
    kept: list[int]
    other: list[int]
    below: int
    above: int
    zeros: int
    quantiles: tuple[float, float, float]
    lowest: float
    highest: float
    sides: list[Side] = field(default_factory=list)
    picks: list[Picks] = field(default_factory=list)


def distribution(
    column: Column, frame: pl.DataFrame, thresholds: Sequence[Threshold], thumbnails: int
) -> Distribution | None:
    """Of one column; None when no clip has a value.

    Args:
        frame: `clip_id`, `kept` (boolean) and the column.
        thresholds: of this column, with values.
        thumbnails: clips in a row of the contact sheet.
    """
    values = pl.col(column.name)
    have = frame.select(
        "clip_id", "kept", values.cast(pl.Float64) if not frame[column.name].dtype.is_float() else values
    )
    have = have.filter(values.is_finite())  # null is not finite
    if have.is_empty():
        return None
    numbers, kept = have[column.name].to_numpy(), have["kept"].to_numpy()
    low, median, high = (float(v) for v in np.quantile(numbers, [0.05, 0.5, 0.95]))
    bins = binned(numbers, kept, [t.value for t in thresholds], whole=column.is_whole)
    sides = []
    for threshold in thresholds:
        passing = int(have.select(threshold.passes(values).sum()).item())
        sides.append(Side(threshold, passing, have.height - passing))
    lowest, highest = float(numbers.min()), float(numbers.max())
    rows = picks(column, have, thresholds, thumbnails) if lowest < highest and thumbnails else []
    return Distribution(
        column=column,
        measured=have.height,
        missing=frame.height - have.height,
        quantiles=(low, median, high),
        lowest=lowest,
        highest=highest,
        sides=sides,
        picks=rows,
        **bins,
    )


def binned(numbers: np.ndarray, kept: np.ndarray, marks: Sequence[float], whole: bool = False) -> dict:
    """The histogram's part of a `Distribution`: robust range, logarithmic where the tail is heavy.

    Args:
        marks: numbers that the axis shall show.
        whole: bins of one integer each.
    """
    at_zero = numbers == 0
    low, median, high = (float(v) for v in np.quantile(numbers, [ROBUST, 0.5, 1 - ROBUST]))
    log = not whole and numbers.min() >= 0 and median > 0 and high > HEAVY_TAIL * median
    zeros = int(at_zero.sum()) if log or (WHOLE_ZERO_SHARE if whole else ZERO_SHARE) < at_zero.mean() < 1 else 0
    if zeros:
        numbers, kept = numbers[~at_zero], kept[~at_zero]
        low, median, high = (float(v) for v in np.quantile(numbers, [ROBUST, 0.5, 1 - ROBUST]))
        log = not whole and numbers.min() > 0 and high > HEAVY_TAIL * median
    shown = numbers
    if log:
        shown = np.log10(numbers)
        low, high = float(np.log10(max(low, high * 1e-6))), float(np.log10(high))
        marks = [float(np.log10(m)) for m in marks if m > 0]
    edges = _edges(low, high, marks, log, whole, len(numbers))
    inside = (shown >= edges[0]) & (shown <= edges[-1])
    every, _ = np.histogram(shown[inside], edges)
    good, _ = np.histogram(shown[inside & kept], edges)
    return {
        "log": log,
        "edges": [float(e) for e in edges],
        "kept": good.tolist(),
        "other": (every - good).tolist(),
        "zeros": zeros,
        "below": int((shown < edges[0]).sum()),
        "above": int((shown > edges[-1]).sum()),
    }


def _edges(low: float, high: float, marks: Sequence[float], log: bool, whole: bool, count: int) -> np.ndarray:
    if whole:
        low, high = (low, high) if high - low >= 2 else (max(low - 2, min(low, 0.0)), high + 2)
        step = max(1.0, np.ceil((high - low) / BINS))
        return np.arange(np.floor(low) - 0.5, np.ceil(high) + step, step)
    if high - low < 1e-9 * max(1.0, abs(low)):  # all the same: nothing but the thresholds gives the axis a scale
        around = [*marks, low] if any(m != low for m in marks) else [max(low - 0.5, min(low, 0.0)), low + 0.5]
        low, high = min(around), max(around)
    span = (high - low) * (LONGEST_STRETCH if not log else np.inf)
    for mark in marks:
        if max(high, mark) - min(low, mark) <= span:
            low, high = min(low, mark), max(high, mark)
    pad = 0.02 * (high - low)
    low = low - pad if log or low < 0 or low - pad > 0 else min(low, 0.0)
    return np.linspace(low, high + pad, int(np.clip(np.sqrt(count) * 2, 12, BINS)) + 1)


def picks(column: Column, have: pl.DataFrame, thresholds: Sequence[Threshold], count: int) -> list[Picks]:
    """Rows of the contact sheet of a score: both ends, and around each threshold.

    Args:
        have: `clip_id` and the score, no nulls.
    """
    name = column.name
    upper, lower = {1: ("Best", "Worst"), -1: ("Worst", "Best"), 0: ("Highest", "Lowest")}[column.good]
    ends = {upper: _end(name, upper, have, count, True), lower: _end(name, lower, have, count, False)}
    first, last = (lower, upper) if lower in ("Best", "Lowest") else (upper, lower)
    distinct = {(t.operator, t.value): t for t in thresholds if t.operator not in ("=", "<>")}
    middle = [_borderline(name, have, t, count) for t in distinct.values()]
    return [ends[first], *(row for row in middle if row.clips), ends[last]]


def _end(name: str, label: str, have: pl.DataFrame, count: int, top: bool) -> Picks:
    """The clips at one end, the outermost first."""
    chosen, tied = _nearest(have, -pl.col(name) if top else pl.col(name), count)
    return Picks(label, [(i, v, None) for i, v in chosen.select("clip_id", name).iter_rows()], tied)


def _borderline(name: str, have: pl.DataFrame, threshold: Threshold, count: int) -> Picks:
    """The clips nearest to a threshold on either side, by rising score."""
    inside = threshold.passes(pl.col(name))
    rows = []
    for keeps, room in ((False, count // 2), (True, count - count // 2)):
        near, _ = _nearest(have.filter(inside == keeps), (pl.col(name) - threshold.value).abs(), room)
        rows += [(i, v, keeps) for i, v in near.select("clip_id", name).iter_rows()]
    where = f"{threshold.sign} {threshold.value:.6g}" + (f" ({threshold.level})" if threshold.level else "")
    return Picks(f"Borderline {where}", sorted(rows, key=lambda row: row[1]))


def _nearest(rows: pl.DataFrame, far: pl.Expr, count: int) -> tuple[pl.DataFrame, int]:
    """The rows that are least far, and how many share the last one's distance where not all of those are among them
    (else 0). Of equal ones those with the lowest ids, which are hashes: a fair draw that repeats."""
    if count == 0 or rows.is_empty():
        return rows.clear(), 0
    rows = rows.with_columns(far.alias("far"))
    edge = rows["far"].bottom_k(count).max()
    closer, equal = rows.filter(pl.col("far") < edge), rows.filter(pl.col("far") == edge)
    room = count - closer.height
    chosen = pl.concat([closer.sort("far", "clip_id"), equal.bottom_k(room, by="clip_id").sort("clip_id")])
    return chosen, equal.height if equal.height > room else 0


@dataclass(frozen=True)
class Density:
    """How two scores lie together: `counts[row][column]` clips between `y[row]`, `y[row + 1]` and `x[column]`, …"""

    x: Column
    y: Column
    log_x: bool
    log_y: bool
    x_edges: list[float]
    y_edges: list[float]
    counts: list[list[int]]
    clips: int


def density(frame: pl.DataFrame, x: Column, y: Column) -> Density | None:
    """Of the clips that have both; None when there is none."""
    both = frame.select(pl.col(x.name).cast(pl.Float64), pl.col(y.name).cast(pl.Float64))
    both = both.filter(pl.all_horizontal(pl.all().is_finite()))
    if both.is_empty():
        return None
    axes = []
    for column in (x, y):
        numbers = both[column.name].to_numpy()
        bins = binned(numbers, np.zeros(len(numbers), bool), [])
        shown = np.log10(np.maximum(numbers, np.finfo(np.float32).tiny)) if bins["log"] else numbers
        many = int(np.clip(np.sqrt(len(numbers)) / 1.5, 10, 80 if column is x else 48)) + 1
        axes.append((bins["log"], shown, np.linspace(bins["edges"][0], bins["edges"][-1], many)))
    (log_x, shown_x, edges_x), (log_y, shown_y, edges_y) = axes
    counts, _, _ = np.histogram2d(shown_y, shown_x, [edges_y, edges_x])
    return Density(x, y, log_x, log_y, edges_x.tolist(), edges_y.tolist(), counts.astype(int).tolist(), both.height)
