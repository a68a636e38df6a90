"""`datakit run decide --what-if`: what a recipe would keep and lose, and what each of its rules does alone.

Every clip becomes a pair of bit masks, the rules that reject it and the rules that cannot tell yet. Clips with equal
masks are counted together in one pass; all that is asked afterwards is answered from that small table.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import polars as pl

from catalogs.query.where import parse_where
from catalogs.tables.catalog import Catalog
from pipelines.recipes.decide import judged
from pipelines.recipes.recipe import Recipe

STATUSES = ("kept", "rejected", "pending", "quarantined")


@dataclass(frozen=True)
class Amount:
    """Clips, and hours of footage."""

    clips: int = 0
    hours: float = 0.0


@dataclass(frozen=True)
class RuleEffect:
    """What one rule of the first level does.

    Attributes:
        rejects: what it rejects, other rules or not.
        only: what it alone rejects: without it, that would be kept, or pending on another rule.
        waits: what it cannot tell about yet.
        kept_without: what would be kept if the recipe did not have it.
    """

    rule: str
    keep: str
    rejects: Amount
    only: Amount
    waits: Amount
    kept_without: Amount


@dataclass(frozen=True)
class WhatIf:
    """The outcome of a recipe on a catalog, nothing written.

    Attributes:
        outcome: status -> amount, marks of people counted in.
        now: the same for the catalog as it is decided now.
        gained, lost: kept by the recipe and not now; the other way round.
        levels: nested level -> amount kept that gets as far as that.
        marked: clips that a person's mark keeps or rejects.
    """

    recipe: str
    outcome: dict[str, Amount]
    now: dict[str, Amount]
    gained: Amount
    lost: Amount
    levels: dict[str, Amount]
    marked: Amount
    rules: list[RuleEffect]

    def as_dict(self) -> dict:
        return asdict(self)


def what_if(catalog: Catalog, recipe: Recipe, where: str | None = None) -> WhatIf:
    """Count what a recipe would decide.

    Args:
        where: SQL condition: count only these clips; shares that a rule computes over the catalog stay those of all
            clips.

    Raises:
        ConfigError: the condition cannot be read.
    """
    names = list(recipe.levels[0])
    with catalog.reading():
        counted = _count(catalog, recipe, None if where is None else parse_where(where))
    status = _status(pl.col("rejects"), pl.col("waits"))
    level = (
        pl.when((pl.col("mark") == "keep").fill_null(False))
        .then(pl.max_horizontal("level", pl.lit(1)))
        .otherwise("level")
    )
    counted = counted.with_columns(status.alias("then"), level.alias("level"))
    kept = counted.filter(pl.col("then") == "kept")
    return WhatIf(
        recipe=recipe.label,
        outcome=_by(counted, "then"),
        now=_by(counted, "status"),
        gained=_sum(kept.filter(pl.col("status") != "kept")),
        lost=_sum(counted.filter((pl.col("status") == "kept") & (pl.col("then") != "kept"))),
        levels={name: _sum(kept.filter(pl.col("level") > i)) for i, name in enumerate(recipe.file.levels)},
        marked=_sum(counted.filter(pl.col("mark").is_not_null() & (pl.col("then") != "quarantined"))),
        rules=[_effect(recipe, counted, bit, name) for bit, name in enumerate(names)],
    )


def _count(catalog: Catalog, recipe: Recipe, where: pl.Expr | None) -> pl.DataFrame:
    """Clips and seconds for each combination of masks, present status, mark and level."""
    looked = {"start_s", "end_s", "status", "mark"} | (set(where.meta.root_names()) if where is not None else set())
    deeper = [pl.all_horizontal(*level.values()).fill_null(False) for level in recipe.levels]
    masks = judged(catalog, recipe, looked).with_columns(
        *recipe.masks(),
        failed=pl.col("errors").list.len().fill_null(0) > 0,
        level=sum(pl.all_horizontal(*deeper[: i + 1]).cast(pl.UInt8) for i in range(len(deeper))),
    )
    if where is not None:
        masks = masks.filter(where)
    keys = ["rejects", "waits", "failed", "status", "mark", "level"]
    return (
        masks.group_by(keys)
        .agg(clips=pl.len(), seconds=(pl.col("end_s") - pl.col("start_s")).sum())
        .collect(engine="streaming")
    )


def _status(rejects: pl.Expr, waits: pl.Expr) -> pl.Expr:
    """As `Recipe.decide` and the view: failures first, then people, then rules."""
    return (
        pl.when("failed")
        .then(pl.lit("quarantined"))
        .when(pl.col("mark") == "keep")
        .then(pl.lit("kept"))
        .when(pl.col("mark") == "reject")
        .then(pl.lit("rejected"))
        .when(rejects != 0)
        .then(pl.lit("rejected"))
        .when(waits != 0)
        .then(pl.lit("pending"))
        .otherwise(pl.lit("kept"))
    )


def _effect(recipe: Recipe, counted: pl.DataFrame, bit: int, name: str) -> RuleEffect:
    own = pl.lit(1 << bit, pl.UInt64)
    judged_by_rules = counted.filter(~pl.col("failed"))
    without = _status(pl.col("rejects") & ~own, pl.col("waits") & ~own)
    keep = next(rule.keep for rule in recipe.file.rules if rule.name == name)
    return RuleEffect(
        rule=name,
        keep=keep if isinstance(keep, str) else keep.get(recipe.file.levels[0], ""),
        rejects=_sum(judged_by_rules.filter((pl.col("rejects") & own) != 0)),
        only=_sum(judged_by_rules.filter(pl.col("rejects") == own)),
        waits=_sum(judged_by_rules.filter((pl.col("waits") & own) != 0)),
        kept_without=_sum(counted.filter(without == "kept")),
    )


def _by(counted: pl.DataFrame, column: str) -> dict[str, Amount]:
    return {status: _sum(counted.filter(pl.col(column) == status)) for status in STATUSES}


def _sum(counted: pl.DataFrame) -> Amount:
    return Amount(int(counted["clips"].sum() or 0), float(counted["seconds"].sum() or 0.0) / 3600)
