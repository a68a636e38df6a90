"""Scores of samples and of training clips side by side: medians, distances, and what could not be compared and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from catalogs.report.score_distributions import binned, score_columns
from catalogs.tables.catalog import Catalog
from datakit.columns import Column
from pipelines.catalog_sync.embeddings import mark_of
from pipelines.stages.registry import STAGES
from sampler.evaluate.distances import Measured, against_floor, kolmogorov_smirnov, wasserstein
from sampler.evaluate.result_sets import SampleSet
from sampler.evaluate.scoring import Planned, plain_marks

MOST_DRAWN = 500_000
"""Training clips that a histogram is made of."""


@dataclass(frozen=True)
class Compared:
    """One score of the samples of one checkpoint.

    Attributes:
        values: of the samples, float64 [n].
        ks: Kolmogorov-Smirnov statistic, 0..1; `shift`: first Wasserstein distance over the standard deviation of the
            training clips' scores (None: those are all equal, or too few).
    """

    label: str
    values: np.ndarray
    median: float
    ks: Measured | None
    shift: Measured | None


@dataclass(frozen=True)
class ScoreComparison:
    """One score: of the training clips, and of the samples of each checkpoint that have it at the same fingerprint.

    Attributes:
        real: scores of the training clips, float64 [n].
    """

    column: Column
    real: np.ndarray
    median: float
    sets: list[Compared]

    def histogram(self) -> dict:
        """Edges and, for the training clips and each checkpoint, the share of each bin: see `numbers.binned` for the
        axis."""
        real = self.real[:MOST_DRAWN]
        every = np.concatenate([real, *(s.values for s in self.sets)])
        bins = binned(every, np.zeros(len(every), bool), [], whole=self.column.is_whole)
        edges = np.array(bins["edges"])
        shares = [_shares(values, edges, bins["log"]) for values in (real, *(s.values for s in self.sets))]
        return {"log": bins["log"], "edges": bins["edges"], "real": shares[0], "sets": shares[1:]}


@dataclass(frozen=True)
class NotCompared:
    """A score that both sides, or one, have, and why they are not compared."""

    column: str
    label: str
    why: str


def compare_scores(
    catalog: Catalog,
    condition: pl.Expr,
    planned: Sequence[Planned],
    sets: Sequence[SampleSet],
    splits: int,
    seed: int,
) -> tuple[list[ScoreComparison], list[NotCompared]]:
    """Every score that the training clips have, over the clips at the fingerprint that most of them have."""
    by_stage = {p.stage: p for p in planned}
    columns = [c for c in score_columns() if c.filled_by in by_stage]
    mine = _scores(catalog, condition, columns)
    theirs = [_scores(Catalog(s.root), pl.lit(True), columns, s.videos["clip_id"]) for s in sets]
    compared, left = [], []
    for column in columns:
        plan = by_stage[column.filled_by]
        real = _values(mine, column, plan)
        parts = []
        for s, rows in zip(sets, theirs):
            values = _values(rows, column, plan)
            if len(values) and len(real):
                parts.append(_compared(s.label, values, real, splits, seed))
            else:
                why = _why(rows, column, plan) if len(real) else "no selected training clip has a value"
                left.append(NotCompared(column.name, s.label, why))
        if parts:
            compared.append(ScoreComparison(column, real, float(np.median(real)), parts))
    return compared, left


def _scores(
    catalog: Catalog, condition: pl.Expr, columns: Sequence[Column], clip_ids: pl.Series | None = None
) -> pl.DataFrame:
    """Scores and, as `mark_STAGE`, the fingerprints they were made at; by clip id. With `clip_ids` a row for each of
    them."""
    names, stages = [c.name for c in columns], {c.filled_by for c in columns}
    wanted = {"clip_id", "stage_versions", *names, *condition.meta.root_names()}
    marks = [mark_of(stage).alias(f"mark_{stage}") for stage in sorted(stages)]
    rows = catalog.clips(columns=sorted(wanted)).filter(condition).select("clip_id", *names, *marks)
    with catalog.reading():
        if clip_ids is None:
            return rows.sort("clip_id").collect()
        found = rows.filter(pl.col("clip_id").is_in(clip_ids.to_list())).collect()
    return clip_ids.to_frame().join(found, on="clip_id", how="left", maintain_order="left")


def _values(rows: pl.DataFrame, column: Column, plan: Planned) -> np.ndarray:
    """Those made at the planned fingerprint."""
    same = plain_marks(rows[f"mark_{column.filled_by}"]).fill_null("") == plan.fingerprint
    values = rows.filter(same)[column.name].cast(pl.Float64).drop_nulls()
    return values.filter(values.is_finite()).to_numpy()


def _why(rows: pl.DataFrame, column: Column, plan: Planned) -> str:
    if rows.is_empty():
        return "none of these samples is a video file"
    marks = plain_marks(rows[f"mark_{column.filled_by}"]).drop_nulls()
    other = sorted(set(marks) - {plan.fingerprint})
    if other:
        return (
            f"samples have it at fingerprint {other[0]}, training clips at {plan.fingerprint}: "
            f"{plan.problem or 'not the same number'}"
        )
    if plan.settings is None:
        return f"stage {column.filled_by} cannot run here as it ran on the training clips: {plan.problem}"
    errors = f"stage {column.filled_by} gave no number" if len(marks) else f"stage {column.filled_by} did not run"
    return f"{errors} on these samples"


def _compared(label: str, values: np.ndarray, real: np.ndarray, splits: int, seed: int) -> Compared:
    scale = float(np.std(real))
    ks = against_floor(values, real, kolmogorov_smirnov, splits, seed)
    shift = against_floor(values, real, lambda x, y: wasserstein(x, y) / scale, splits, seed) if scale > 0 else None
    return Compared(label, values, float(np.median(values)), ks, shift)


def _shares(values: np.ndarray, edges: np.ndarray, log: bool) -> list[float]:
    """Per cent of the values in each bin; those beyond the ends, and zeros on a logarithmic axis, count in the
    outermost."""
    shown = np.log10(np.maximum(values, 1e-300)) if log else values
    counts, _ = np.histogram(np.clip(shown, edges[0], edges[-1]), edges)
    return [float(c) for c in 100 * counts / max(1, len(values))]


def stages_not_run(planned: Sequence[Planned]) -> list[tuple[str, str]]:
    """Stages of the training clips that could not be repeated here, and why."""
    return [(p.stage, p.problem) for p in planned if p.settings is None and STAGES[p.stage].columns]
