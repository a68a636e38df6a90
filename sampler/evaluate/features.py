"""Features of both sides, from the tables `embeddings`: how far samples are from the training footage, beside noise and
a still."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from catalogs.tables.catalog import Catalog
from sampler.evaluate.distances import KernelDistance, Measured, against_floor, frechet, kernel_distance
from sampler.evaluate.result_sets import SampleSet

MOST_REAL = 20_000
"""Training clips that distances are measured to, drawn by their ids, which are hashes."""
LEAST = 2
"""Vectors without which there is no covariance, and no unbiased kernel distance."""


@dataclass(frozen=True)
class RealFeatures:
    """Features of the selected training clips.

    Attributes:
        rows: by clip_id: clip_id, duplicate_group, split; every clip that has a vector.
        vectors: of the first `MOST_REAL` rows, unit length, float32 [n, d].
    """

    catalog: Catalog
    fingerprint: str
    model: str
    weights_hash: str
    rows: pl.DataFrame
    vectors: np.ndarray

    def of(self, clip_ids: pl.Series) -> np.ndarray:
        """Vectors of some of the clips, in their order, float32 [n, d]."""
        wanted = clip_ids.to_frame()
        parts = [(rows.join(wanted, on="clip_id", how="semi"), vectors) for rows, vectors in self.batches()]
        found = pl.concat([rows for rows, _ in parts]).with_row_index("at")
        stacked = np.concatenate([vectors[rows["row"].to_numpy()] for rows, vectors in parts])
        return stacked[wanted.join(found, on="clip_id", how="left", maintain_order="left")["at"].to_numpy()]

    def batches(self) -> Iterator[tuple[pl.DataFrame, np.ndarray]]:
        """All rows with their `row` in the vectors beside them, shard by shard where they are many."""
        if self.rows.height == len(self.vectors):
            yield self.rows.with_row_index("row"), self.vectors
            return
        with self.catalog.reading():
            for shard in sorted(set(self.rows["shard"])):
                vectors = (
                    _vectors(self.catalog, self.fingerprint)
                    .filter(pl.col("shard") == shard)
                    .select("clip_id", "vector")
                    .collect()
                )
                rows = self.rows.filter(pl.col("shard") == shard).join(vectors, on="clip_id")
                yield rows.drop("vector").with_row_index("row"), _stacked(rows)


@dataclass(frozen=True)
class FeatureDistance:
    """Of one set to the training footage.

    Attributes:
        kind: samples, noise, still.
        frechet: squared Fréchet distance; None: not enough.
        kernel: kernel distance of all of the set to all of the footage; `kernel_splits`: the same in splits, with its
            floor.
    """

    label: str
    kind: str
    count: int
    frechet: Measured | None
    kernel: KernelDistance | None
    kernel_splits: Measured | None


@dataclass(frozen=True)
class FeatureComparison:
    """`problem`: why there is nothing."""

    model: str = ""
    real: int = 0
    distances: list[FeatureDistance] = field(default_factory=list)
    problem: str = ""

    def nearer(self, label: str) -> dict[str, bool]:
        """Whether the samples of a checkpoint are nearer to the footage than each baseline, by the Fréchet distance."""
        by_label = {d.label: d for d in self.distances}
        own = by_label[label].frechet
        others = {d.label: d.frechet for d in self.distances if d.kind != "samples"}
        return {name: own.value.mean < other.value.mean for name, other in others.items() if own and other}


def read_real(catalog: Catalog, condition: pl.Expr, fingerprint: str) -> RealFeatures | None:
    """The selected clips that are embedded at a fingerprint; None: there are none."""
    columns = ["clip_id", "shard", "duplicate_group", "split"]
    clips = catalog.clips(columns=sorted({*columns, *condition.meta.root_names()})).filter(condition).select(columns)
    have = _vectors(catalog, fingerprint)
    with catalog.reading():
        rows = clips.join(have.select("clip_id"), on="clip_id", how="semi").sort("clip_id").collect()
        if rows.is_empty():
            return None
        drawn = rows["clip_id"].head(MOST_REAL)
        near = have.filter(pl.col("clip_id") <= drawn[-1])
        found = near.join(drawn.to_frame().lazy(), on="clip_id", how="semi").sort("clip_id").collect()
    return RealFeatures(catalog, fingerprint, found["model"][0], found["weights_hash"][0], rows, _stacked(found))


def read_samples(s: SampleSet, fingerprint: str) -> tuple[pl.DataFrame, np.ndarray]:
    """Rows of the samples that are embedded at a fingerprint, and their vectors, float32 [n, d]. Samples with one file
    between them have its vector each."""
    catalog = Catalog(s.root)
    with catalog.reading():
        found = _vectors(catalog, fingerprint).select("clip_id", "vector").collect()
    rows = s.videos.join(found, on="clip_id", maintain_order="left")
    return rows.drop("vector"), _stacked(rows)


def distance_to(
    real: RealFeatures, label: str, kind: str, vectors: np.ndarray, splits: int, seed: int
) -> FeatureDistance:
    """How far a set of vectors is from the footage."""
    enough = len(vectors) >= LEAST and len(real.vectors) >= LEAST
    kernel = kernel_distance(scaled(vectors), scaled(real.vectors), seed) if enough else None
    return FeatureDistance(
        label,
        kind,
        len(vectors),
        against_floor(vectors, real.vectors, frechet, splits, seed, LEAST),
        kernel,
        against_floor(
            scaled(vectors), scaled(real.vectors), lambda x, y: kernel_distance(x, y, seed).mean, splits, seed, LEAST
        ),
    )


def scaled(vectors: np.ndarray) -> np.ndarray:
    """Unit vectors, so that their coordinates have mean square 1: for that the kernel's 1/d is made."""
    return vectors * np.sqrt(vectors.shape[1]) if len(vectors) else vectors


def _vectors(catalog: Catalog, fingerprint: str) -> pl.LazyFrame:
    rows = catalog.embeddings().filter((pl.col("fingerprint") == fingerprint) & pl.col("vector").is_not_null())
    return rows.select("clip_id", "shard", "model", "weights_hash", "vector").unique("clip_id")


def _stacked(rows: pl.DataFrame) -> np.ndarray:
    return np.stack(list(rows["vector"].to_numpy())).astype(np.float32) if rows.height else np.zeros((0, 0), np.float32)
