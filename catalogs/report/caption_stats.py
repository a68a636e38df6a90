"""What the report says about captions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from catalogs.query.selection import Selection
from catalogs.report.score_distributions import binned

SAMPLE = 200_000
WORD = r"[\p{L}\p{N}]+(?:['’-][\p{L}\p{N}]+)*"
FREQUENT = 30
COMMON = frozenset(
    "a an the and or but of in on at to from with by for as is are was were be been being it its this that these "
    "those there "
    "their they them his her he she him i you we who which what while where when into onto over under up down out "
    "off near "
    "through between across has have had not no".split()
)
"""English words that say nothing about a picture; left out of the list of frequent words, not of the counts."""


@dataclass(frozen=True)
class Words:
    """Captions of the clips of a selection.

    Attributes:
        by_style: style, model, captions, failed.
        flags: (flag, captions).
        sampled: captions that lengths and words were counted in; all of them when it equals `captions`.
        lengths: see `numbers.binned`, in words. `length_quantiles` at 5, 50, 95 %.
        frequent: (word, share of the sampled captions that have it).
    """

    captions: int
    by_style: pl.DataFrame
    flags: list[tuple[str, int]]
    sampled: int
    lengths: dict | None
    length_quantiles: tuple[float, float, float] | None
    vocabulary: int
    words: int
    frequent: list[tuple[str, float]]


def words(selection: Selection) -> Words:
    """Count the captions; words in a sample of at most `SAMPLE` of them."""
    rows = selection.catalog.captions(selection.versions)
    if selection.where is not None:
        rows = rows.join(selection.rows(["clip_id"]), on="clip_id", how="semi")
    has_text = pl.col("text").is_not_null()
    by_style = rows.group_by("style", "model").agg(has_text.sum().alias("captions"), (~has_text).sum().alias("failed"))
    by_style = by_style.collect(engine="streaming").sort("captions", descending=True)
    flags = rows.select("flags").explode("flags").drop_nulls().group_by("flags").len().collect(engine="streaming")
    flags = flags.sort("len", "flags", descending=[True, False])
    count = int(by_style["captions"].sum() or 0)
    texts = _sample(rows.filter(has_text), count).select("text").collect(engine="streaming")
    lengths = texts["text"].str.count_matches(WORD).cast(pl.Int64).to_numpy()
    vocabulary, total, frequent = _frequencies(texts)
    return Words(
        count,
        by_style,
        list(flags.iter_rows()),
        texts.height,
        binned(lengths, np.zeros(len(lengths), bool), [], whole=True) if len(lengths) else None,
        tuple(float(q) for q in np.quantile(lengths, [0.05, 0.5, 0.95])) if len(lengths) else None,
        vocabulary,
        total,
        frequent,
    )


def _sample(rows: pl.LazyFrame, count: int) -> pl.LazyFrame:
    """Caption ids are hashes: those below a bound are a fair sample, and the same one every time."""
    if count <= SAMPLE:
        return rows
    bound = f"{int(SAMPLE / count * 16**8):08x}"
    return rows.filter(pl.col("caption_id").str.slice(0, 8) < bound)


def _frequencies(texts: pl.DataFrame) -> tuple[int, int, list[tuple[str, float]]]:
    """Different words, words, and the most frequent with the share of texts that have them; a part of the texts at a
    time."""
    seen = []
    for start in range(0, texts.height, 20_000):
        found = pl.col("text").str.to_lowercase().str.extract_all(WORD).alias("word")
        part = texts.slice(start, 20_000).with_row_index().select("index", found).explode("word").drop_nulls("word")
        counted = part.group_by("word").agg(pl.len().alias("times"), pl.col("index").n_unique().alias("texts"))
        seen.append(counted)
    if not seen:
        return 0, 0, []
    every = pl.concat(seen).group_by("word").agg(pl.col("times", "texts").sum())
    top = (
        every.filter(~pl.col("word").is_in(list(COMMON))).sort("texts", "word", descending=[True, False]).head(FREQUENT)
    )
    return (
        every.height,
        int(every["times"].sum() or 0),
        [(word, n / texts.height) for word, n in top.select("word", "texts").iter_rows()],
    )
