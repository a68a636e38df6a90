"""What the filters of the app offer: for every score its range and histogram, for every category its values. Once per
snapshot."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import polars as pl

from catalogs.browse.clip_index import DURATION, Index
from catalogs.browse.snapshot_reader import FACTS, NUMBERS
from catalogs.tables.arrow_types import view_schema
from catalogs.tables.schema import SCORES, TABLES, VIEW_ADDED, VIEW_FROM_VIDEOS
from datakit.columns import Column

BINS = 40
OUTSIDE = 0.004
"""Share of values beyond each end of a slider; the end itself stands for "no bound"."""
SAMPLE = 200_000
MOST_VALUES = 40
TECHNICAL = frozenset({"stream", "start_pts", "end_pts", "start_s", "end_s"})
SLIDERS = (
    DURATION,
    *(c.name for c in SCORES if c.is_number and c.shown),
    "duplicate_similarity",
    "loss",
    "level",
)
CHECKBOXES = (
    "status",
    "mark",
    "kind",
    *(c.name for c in SCORES if c.is_text and c.shown),
    "split",
    "duplicate_kind",
    "codec",
    "license",
    "container",
    "pix_fmt",
)


@dataclass(frozen=True)
class Range:
    """A slider: `expression` is SQL; `counts[i]` clips have values in the i-th of equal parts of [low, high], values
    beyond counted in the outer parts. `whole`: integers. `score`: shown before the technical facts."""

    name: str
    expression: str
    unit: str
    meaning: str
    low: float
    high: float
    whole: bool
    counts: list[int]
    missing: int
    score: bool


@dataclass(frozen=True)
class Choice:
    """Checkboxes: the values of a column with their numbers of clips, the commonest first (null: no value)."""

    name: str
    meaning: str
    values: list[tuple[str | None, int]]


def facets(index: Index) -> dict:
    """`ranges` and `choices`; what has no values, or only one, is left out."""
    others = [
        n for n in (*NUMBERS, *(f for f, few in FACTS.items() if not few)) if n not in SLIDERS and n not in TECHNICAL
    ]
    ranges = [_range(index, name) for name in (*SLIDERS, *others) if name != "loss" or index.versions["losses"]]
    choices = [_choice(index, name) for name in CHECKBOXES]
    return {"ranges": [asdict(r) for r in ranges if r], "choices": [asdict(c) for c in choices if c]}


def described() -> list[dict]:
    """Every column of the view: name, type, unit, meaning, the stage that fills it, and whether rows can be sorted by
    it."""
    return [
        {
            "name": name,
            "type": str(kind),
            "unit": about[name].unit,
            "meaning": about[name].meaning,
            "good": about[name].good,
            "filled_by": about[name].filled_by,
            "sortable": not (kind.is_nested() or kind == pl.Binary),
            "nested": kind.is_nested() or kind == pl.Binary,
        }
        for about in [_about()]
        for name, kind in view_schema().items()
    ]


def _about() -> dict[str, Column]:
    of_videos = {c.name: c for c in TABLES["videos"] if c.name in VIEW_FROM_VIDEOS}
    return {**of_videos, **{c.name: c for c in (*TABLES["clips"], *VIEW_ADDED)}}


def _range(index: Index, name: str) -> Range | None:
    values = index.column(name)
    if name == DURATION:
        unit, meaning, expression = "s", "end_s − start_s", "(end_s - start_s)"
    else:
        unit, meaning, expression = _about()[name].unit, _about()[name].meaning, name
    if not values.dtype.is_numeric() or values.null_count() == len(values):
        return None
    there = values.drop_nulls()
    sample = there.gather_every(max(1, len(there) // SAMPLE))
    low, high = (float(sample.quantile(q, "nearest")) for q in (OUTSIDE, 1 - OUTSIDE))
    if len(there) <= SAMPLE:
        low, high = (float(there.min()), float(there.max())) if len(there) < 1000 else (low, high)
    if not np.isfinite([low, high]).all() or high <= low:
        return None
    part = ((there.to_numpy() - np.float32(low)) * np.float32(BINS / (high - low))).clip(0, BINS - 1)
    counts = np.bincount(np.nan_to_num(part).astype(np.uint8), minlength=BINS).tolist()
    return Range(
        name,
        expression,
        unit,
        meaning,
        low,
        high,
        values.dtype.is_integer(),
        counts,
        values.null_count(),
        name in SLIDERS,
    )


def _choice(index: Index, name: str) -> Choice | None:
    values = index.column(name)
    counted = values.value_counts(sort=True)
    if len(counted) < 2 or len(counted) > 2000:
        return None
    pairs = [(None if v is None else str(v), n) for v, n in counted.rows()]
    return Choice(name, _about()[name].meaning, pairs[:MOST_VALUES])
