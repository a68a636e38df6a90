"""Memorisation: how near each sample is to its nearest training clip, beside how near real clips are that were not
trained on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from sampler.evaluate.features import RealFeatures

PERCENTILE = 1.0
"""Of the held-out clips' distances: a sample that is nearer to a training clip is flagged."""
LEAST_HELD = 20
"""Held-out clips without which a tenth of the training clips is held out besides."""
TENTH = 0.1
MOST_HELD = 5000
CHUNK = 4096


@dataclass(frozen=True)
class Neighbour:
    """A sample and its nearest training clip. `distance`: 1 − cosine; `is_source`: that clip's caption is the sample's
    prompt."""

    label: str
    sample_id: str
    clip_id: str
    distance: float
    flagged: bool
    is_source: bool = False


@dataclass(frozen=True)
class Memorisation:
    """Attributes:
    neighbours: of every sample, the nearest first.
    held: distances of held-out clips to their nearest training clips, rising, float64 [n].
    held_from: what they are, in words.
    threshold: the 1st percentile of `held`, None: too few to say.
    problem: why there is nothing.
    """

    neighbours: list[Neighbour] = field(default_factory=list)
    held: np.ndarray = field(default_factory=lambda: np.zeros(0))
    held_from: str = ""
    trained: int = 0
    threshold: float | None = None
    problem: str = ""

    @property
    def flagged(self) -> list[Neighbour]:
        return [n for n in self.neighbours if n.flagged]


def memorisation(
    real: RealFeatures, samples: Sequence[tuple[str, pl.DataFrame, np.ndarray]], seed: int
) -> Memorisation:
    """Look for every sample among the training clips.

    Args:
        samples: for each checkpoint its label, rows (sample_id, source_clip) and vectors.
    """
    rows = real.rows.with_columns(pl.coalesce("duplicate_group", "clip_id").rank("dense").cast(pl.Int64).alias("group"))
    trained = rows.filter(pl.col("split").fill_null("train") == "train")
    if trained.is_empty():
        return Memorisation(problem="none of the selected clips is of the split train")
    held, held_from = _held_out(rows, trained, seed)
    distances = np.zeros(0)
    if held.height:
        others = trained.join(held, on="clip_id", how="anti")
        found, _ = nearest(real.of(held["clip_id"]), _batches(real, others), held["group"].to_numpy())
        distances = np.sort(found[np.isfinite(found)])
    threshold = float(np.percentile(distances, PERCENTILE)) if len(distances) else None
    found = []
    for label, these, vectors in samples:
        near, clips = nearest(vectors, _batches(real, trained))
        found += [
            Neighbour(label, sample, clip, float(d), threshold is not None and bool(d < threshold), clip == source)
            for sample, source, clip, d in zip(these["sample_id"], these["source_clip"], clips, near)
            if clip is not None
        ]
    return Memorisation(
        sorted(found, key=lambda n: (n.distance, n.sample_id)), distances, held_from, trained.height, threshold
    )


def nearest(
    queries: np.ndarray,
    batches: Iterable[tuple[np.ndarray, np.ndarray, Sequence[str]]],
    groups: np.ndarray | None = None,
) -> tuple[np.ndarray, list[str | None]]:
    """The nearest of many unit vectors to each of some.

    Args:
        queries: unit vectors, float32 [q, d].
        batches: vectors [n, d], their groups [n] and names, part by part.
        groups: of the queries: members of the same group are no neighbours.

    Returns:
        1 − cosine, float64 [q] (infinite: no neighbour), and names.
    """
    best, names = np.full(len(queries), -np.inf), np.full(len(queries), None, object)
    for vectors, of, known in batches:
        for start in range(0, len(queries), CHUNK):
            part = slice(start, start + CHUNK)
            cosines = queries[part] @ vectors.T
            if groups is not None:
                cosines[groups[part, None] == of[None, :]] = -np.inf
            at = cosines.argmax(axis=1)
            top = cosines[np.arange(len(at)), at]
            better = top > best[part]
            best[part][better] = top[better]
            names[part][better] = np.asarray(known, object)[at[better]]
    return 1.0 - np.minimum(best, 1.0), list(names)


def _held_out(rows: pl.DataFrame, trained: pl.DataFrame, seed: int) -> tuple[pl.DataFrame, str]:
    """Clips that were not trained on; where there are few, also a seeded tenth of those that were (at least as many as
    are lacking, at most half)."""
    apart = rows.join(trained, on="clip_id", how="anti")
    if apart.height >= LEAST_HELD:
        return apart.head(MOST_HELD), "clips of the splits val and test"
    wanted = min(max(round(trained.height * TENTH), LEAST_HELD - apart.height), trained.height // 2, MOST_HELD)
    drawn = trained[np.sort(np.random.default_rng(seed).permutation(trained.height)[:wanted])]
    told = f"{wanted} clips drawn from those trained on" + (
        f", and {apart.height} of the splits val and test" if apart.height else ""
    )
    return pl.concat([apart, drawn]), told


def _batches(real: RealFeatures, rows: pl.DataFrame) -> Iterator[tuple[np.ndarray, np.ndarray, list[str]]]:
    groups = rows.select("clip_id", "group")
    for batch, vectors in real.batches():
        for some in batch.join(groups, on="clip_id").iter_slices(CHUNK):
            yield vectors[some["row"].to_numpy()], some["group"].to_numpy(), some["clip_id"].to_list()
