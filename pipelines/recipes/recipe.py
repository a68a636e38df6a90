"""Recipes: named rules that turn scores into a status.

A rule is a SQL expression over the columns of the view `clips` (see `datakit catalog show`), evaluated by
polars; it says which clips to *keep*. What a rule cannot tell yet (a column that is null) leaves the clip
pending. A recipe may have nested levels: then a rule may give one expression per level.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from importlib import resources
from pathlib import Path

import polars as pl
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from catalogs.query.where import parse_condition
from catalogs.tables.schema import filler
from datakit.errors import ConfigError
from datakit.hashing import hash_hex

MOST_RULES = 63
"""Bits of the masks that rules become."""


class Rule(BaseModel):
    """`keep`: one expression, or a mapping of level name to expression (levels without one inherit)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    keep: str | dict[str, str]
    source: str


class RecipeFile(BaseModel):
    """`captions`: styles in order of preference; the first that a clip has in a usable form is its caption."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    description: str
    levels: list[str] = ["kept"]
    captions: list[str] = ["refined", "dense", "short", "imported"]
    rules: list[Rule]


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. `levels[i]` maps rule name to the polars expression that keeps, at level i + 1."""

    file: RecipeFile
    levels: tuple[dict[str, pl.Expr], ...]

    @property
    def name(self) -> str:
        return self.file.name

    @property
    def label(self) -> str:
        """Name and hash: what `decisions.recipe` records."""
        text = json.dumps(self.file.model_dump(), sort_keys=True)
        return f"{self.name}@{hash_hex(text, 4)}"

    def columns(self) -> set[str]:
        """Columns that any rule looks at."""
        return {name for level in self.levels for rule in level.values() for name in rule.meta.root_names()}

    def without(self, stages: set[str]) -> Recipe:
        """The recipe less the rules that look at a column which one of `stages` fills."""
        levels = tuple(
            {name: rule for name, rule in level.items() if not stages & set(map(filler, rule.meta.root_names()))}
            for level in self.levels
        )
        return Recipe(self.file, levels)

    def waits_for(self, filled: set[str]) -> dict[str, str]:
        """Rule -> stage, for rules whose columns no stage in `filled` (and nothing else) fills."""
        known = filled | {"ingest", "view"}
        return {
            name: stage
            for level in reversed(self.levels)
            for name, rule in level.items()
            for stage in map(filler, rule.meta.root_names())
            if stage is not None and stage not in known
        }

    def decide(self, clips: pl.LazyFrame) -> pl.LazyFrame:
        """Status of every clip.

        Args:
            clips: the view, with at least the rules' columns, `clip_id`, `shard` and `errors`.

        Returns:
            rows of the table `decisions`.
        """
        names = list(self.levels[0])
        failed = pl.col("errors").list.len().fill_null(0) > 0
        passes = [pl.all_horizontal(*level.values()).fill_null(False) for level in self.levels]
        level = reduce(lambda deeper, p: pl.when(p).then(1 + deeper).otherwise(0), reversed(passes), pl.lit(0))
        broken = pl.col("errors").list.eval(pl.element().struct.field("stage")).list.unique(maintain_order=True)
        judged = clips.select(
            "clip_id",
            "shard",
            *self.masks(),
            level.alias("level"),
            failed.alias("failed"),
            pl.when(failed).then("errors").otherwise(None).alias("errors"),
        )
        status = (
            pl.when("failed")
            .then(pl.lit("quarantined"))
            .when(pl.col("rejects") != 0)
            .then(pl.lit("rejected"))
            .when(pl.col("waits") != 0)
            .then(pl.lit("pending"))
            .otherwise(pl.lit("kept"))
        )
        telling = pl.when(pl.col("rejects") != 0).then("rejects").otherwise("waits")
        reasons = telling.map_batches(
            lambda masks: _names(masks, names), return_dtype=pl.List(pl.String), is_elementwise=True
        )
        return judged.select(
            "clip_id",
            "shard",
            status.alias("status"),
            pl.when("failed").then(broken).otherwise(reasons).alias("reasons"),
            pl.lit(self.label).alias("recipe"),
            pl.when(status == "kept").then("level").otherwise(0).cast(pl.Int32).alias("level"),
        )

    def masks(self) -> tuple[pl.Expr, pl.Expr]:
        """Two integers for each clip, `rejects` and `waits`: bit i is set where rule i of the first level rejects it,
        or cannot tell."""
        rules = list(self.levels[0].values())
        return _mask([~rule for rule in rules]).alias("rejects"), _mask([rule.is_null() for rule in rules]).alias(
            "waits"
        )


def _mask(conditions: list[pl.Expr]) -> pl.Expr:
    return pl.sum_horizontal(*(c.fill_null(False).cast(pl.UInt64) * (1 << bit) for bit, c in enumerate(conditions)))


def _names(masks: pl.Series, names: list[str]) -> pl.Series:
    """Names of the bits that are set. There are few different masks, however many clips. Null (polars leaves out what a
    `when` does not take): null."""
    different = masks.drop_nulls().unique()
    lists = [[name for bit, name in enumerate(names) if mask >> bit & 1] for mask in different]
    known = pl.DataFrame({"mask": different, "names": pl.Series(lists, dtype=pl.List(pl.String))})
    return pl.DataFrame({"mask": masks}).join(known, on="mask", how="left", maintain_order="left")["names"]


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with datakit."""
    return sorted(
        p.name.removesuffix(".yaml") for p in resources.files("pipelines.recipes").iterdir() if p.name.endswith(".yaml")
    )


def load_recipe(name_or_file: str, rules: Sequence[str] = (), without: Sequence[str] = ()) -> Recipe:
    """A shipped recipe by name, or a YAML file.

    Args:
        rules: `NAME=CONDITION`, each in place of the recipe's rule of that name, or after the others.
        without: names of rules to leave out.

    Raises:
        ConfigError: not found, malformed, a rule over an unknown column, or no rule of that name to leave out.
    """
    return build(_edited(_read(name_or_file), rules, without))


def build(file: RecipeFile) -> Recipe:
    """A recipe from its parts; see `load_recipe`."""
    levels = []
    for index in range(len(file.levels)):
        rules = {}
        for rule in file.rules:
            expression = _expression(rule, file.levels[: index + 1])
            if expression is not None:
                rules[rule.name] = parse_condition(expression, f"rule {rule.name}")
        levels.append(rules)
    if not levels or not levels[0]:
        raise ConfigError(f"recipe {file.name} has no rules at its first level")
    if len(levels[0]) > MOST_RULES:
        raise ConfigError(f"recipe {file.name} has {len(levels[0])} rules, {MOST_RULES} is the most")
    return Recipe(file, tuple(levels))


def _edited(file: RecipeFile, rules: Sequence[str], without: Sequence[str]) -> RecipeFile:
    kept = {rule.name: rule for rule in file.rules}
    for name in without:
        if name not in kept:
            raise ConfigError(f"recipe {file.name} has no rule {name!r}: it has {', '.join(kept)}")
        del kept[name]
    for text in rules:
        name, found, condition = (part.strip() for part in text.partition("="))
        if not (name.isidentifier() and found and condition):
            raise ConfigError(
                f"--rule takes NAME=CONDITION, for example 'motion=motion between 2 and 40', not {text!r}"
            )
        kept[name] = Rule(name=name, keep=condition, source="the command line")
    return file.model_copy(update={"rules": list(kept.values())})


def _read(name_or_file: str) -> RecipeFile:
    shipped = resources.files("pipelines.recipes") / f"{name_or_file}.yaml"
    if shipped.is_file():
        text = shipped.read_text()
    elif Path(name_or_file).is_file():
        text = Path(name_or_file).read_text()
    else:
        raise ConfigError(f"no recipe {name_or_file!r}: give a YAML file or one of {', '.join(shipped_recipes())}")
    try:
        return RecipeFile.model_validate(yaml.safe_load(text))
    except (ValidationError, yaml.YAMLError) as e:
        raise ConfigError(f"recipe {name_or_file} is malformed: {e}") from e


def _expression(rule: Rule, levels: list[str]) -> str | None:
    """The rule's expression at the last of `levels`: its own, else that of the level before."""
    if isinstance(rule.keep, str):
        return rule.keep
    return next((rule.keep[name] for name in reversed(levels) if name in rule.keep), None)
