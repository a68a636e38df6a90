"""All that a report says, computed from one selection, before any of it becomes a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import polars as pl

from catalogs.query.selection import Selection
from catalogs.report.caption_stats import Words, words
from catalogs.report.counts import Duplicates, Facts, Failure, decided_by, duplicates, facts, failures, runs
from catalogs.report.score_distributions import Density, Distribution, Side, density, distribution, score_columns
from catalogs.report.thresholds import DURATION, Rule, Threshold, Unread, extract, resolved
from catalogs.report.training_losses import Training, training

DENSITY_Y = ("aesthetic", "blur", "brightness")
"""What is drawn against motion: the first that has values."""


@dataclass(frozen=True)
class Content:
    """See the classes of the parts.

    Attributes:
        recipe: name of the recipe whose thresholds are drawn; `decided_by`: labels of those that decided.
        unread: rules without a drawn line.
        duration_sides: counts either side of the thresholds on duration.
        blank: scores that no clip has.
    """

    root: str
    versions: dict[str, int]
    snapshot: str | None
    where: str | None
    made_at: datetime
    recipe: str | None
    decided_by: list[str]
    rules: tuple[Rule, ...]
    unread: list[Unread]
    facts: Facts
    scores: list[Distribution]
    blank: list[str]
    duration_sides: list[Side]
    density: Density | None
    failures: tuple[list[Failure], list[Failure]]
    words: Words
    training: Training | None
    duplicates: Duplicates
    runs: pl.DataFrame
    stages: list[tuple[str, float]]
    thumbnails: int

    def pictured(self) -> list[str]:
        """Ids of the clips on contact sheets."""
        trained = [*self.training.worst, *self.training.best] if self.training else []
        scored = [clip_id for score in self.scores for row in score.picks for clip_id, _, _ in row.clips]
        return [*scored, *(clip.clip_id for clip in trained)]


def no_clips(content: Content) -> str:
    """In place of a chart of nothing."""
    return "No clip matches the condition." if content.where is not None else "There are no clips."


def gather(
    selection: Selection,
    rules: Sequence[Rule],
    recipe: str | None,
    snapshot: str | None,
    thumbnails: int,
    run: str | None = None,
) -> Content:
    """Compute everything. The memory it takes is some hundred bytes a clip.

    Args:
        run: see `catalogs.report.training_losses.training`.
    """
    thresholds, unread = extract(rules)
    every = resolved(thresholds, selection.catalog, selection.versions)
    thresholds = [t for t in every if t.value is not None]
    counted = facts(selection)
    scores, blank, dense = _scores(selection, thresholds, thumbnails)
    drawn = {d.column.name for d in scores} | {DURATION}
    undrawn = [t for t in every if t.value is None or t.column not in drawn]
    unread += [Unread(t.rule, t.level, f"{t.column} {t.sign} {t.text}", _why(t, blank)) for t in undrawn]
    table, stages = runs(selection)
    return Content(
        root=selection.catalog.root,
        versions=selection.versions,
        snapshot=snapshot,
        where=selection.where,
        made_at=datetime.now(UTC),
        recipe=recipe,
        decided_by=decided_by(selection),
        rules=tuple(rules),
        unread=unread,
        facts=counted,
        scores=scores,
        blank=blank,
        duration_sides=_sides(counted.seconds, [t for t in thresholds if t.column == DURATION]),
        density=dense,
        failures=failures(selection),
        words=words(selection),
        training=training(selection, run, thumbnails),
        duplicates=duplicates(selection),
        runs=table,
        stages=stages,
        thumbnails=thumbnails,
    )


def _scores(
    selection: Selection, thresholds: list[Threshold], thumbnails: int
) -> tuple[list[Distribution], list[str], Density | None]:
    """Distributions of the scores that have values, names of those that have none, and motion against another score."""
    columns = score_columns()
    if not selection.catalog.scan("losses").select(pl.len()).collect().item():
        columns = [c for c in columns if c.name != "loss"]
    names = [c.name for c in columns]
    frame = (
        selection.rows(["clip_id", "status", *names])
        .select("clip_id", (pl.col("status") == "kept").alias("kept"), *names)
        .collect(engine="streaming")
    )
    found = []
    for c in columns:
        own = [t for t in thresholds if t.column == c.name]
        found.append(distribution(c, frame.select("clip_id", "kept", c.name), own, thumbnails))
    scores = [d for d in found if d is not None]
    by_name = {d.column.name: d.column for d in scores}
    other = next((by_name[name] for name in DENSITY_Y if name in by_name), None)
    dense = density(frame, by_name["motion"], other) if "motion" in by_name and other else None
    return scores, [c.name for c, d in zip(columns, found) if d is None], dense


def _why(threshold: Threshold, blank: list[str]) -> str:
    return (
        f"{threshold.column} was not measured" if threshold.column in blank else f"{threshold.column} has no histogram"
    )


def _sides(seconds: pl.Series, thresholds: list[Threshold]) -> list[Side]:
    frame = pl.DataFrame({"seconds": seconds})
    passing = [frame.select(t.passes(pl.col("seconds")).sum()).item() for t in thresholds]
    return [Side(t, int(n), frame.height - int(n)) for t, n in zip(thresholds, passing)]
