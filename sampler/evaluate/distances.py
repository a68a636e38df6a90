"""How far apart two sets are: of vectors (Fréchet, kernel), of numbers (Kolmogorov-Smirnov, Wasserstein); and the noise
floor.

A distance between finite sets is not zero where the distributions are the same, and the fewer there are the larger it
is. So each is measured beside its floor: as many real clips, held out, against the same other real clips.

scipy gives the same numbers, which the tests check, in 1 to 2 times the time, and weighs 113 MB, which the base
installation does without; with its `sqrtm` the Fréchet distance takes 1.5 to 4 times as long, and where covariances are
singular −3e-5 comes out for 0. The kernel distance of torchmetrics 1.9 draws from torch's global random state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

MOST_IN_BLOCK = 1000
"""Vectors of a block of the kernel distance, at most: Bińkowski et al. 2018."""
BLOCKS = 10
LEAST_IN_BLOCK = 4
MOST_REAL = 200_000
"""Real numbers that a floor is made of; more do not change it."""

Distance = Callable[[np.ndarray, np.ndarray], float]


@dataclass(frozen=True)
class Spread:
    """Of a number over seeded splits."""

    mean: float
    std: float


@dataclass(frozen=True)
class Measured:
    """A distance and its floor: `count` of the set, and `count` held-out real ones, each against the same `others`."""

    value: Spread
    floor: Spread
    count: int
    others: int


@dataclass(frozen=True)
class KernelDistance:
    """Mean over blocks, and its standard error (None: one block)."""

    mean: float
    error: float | None
    blocks: int


def against_floor(
    values: np.ndarray, real: np.ndarray, distance: Distance, splits: int, seed: int, least: int = 1
) -> Measured | None:
    """A distance to real ones, with its noise floor. In each split as many real ones as there are values (at most half)
    are held out; both they and the values (a draw of them, if they are more) are compared with the real ones left.

    Args:
        values, real: numbers [n] or vectors [n, d].
        least: members of a set that the distance can do with.

    Returns:
        None: not enough of either.
    """
    count = min(len(values), len(real) // 2)
    if count < least:
        return None
    found, floors = [], []
    for split in range(splits):
        rng = np.random.default_rng((seed, split))
        order = rng.permutation(len(real))[: max(2 * count, MOST_REAL)]
        held, others = real[np.sort(order[:count])], real[np.sort(order[count:])]
        drawn = values if len(values) == count else values[np.sort(rng.permutation(len(values))[:count])]
        found.append(distance(drawn, others))
        floors.append(distance(held, others))
    return Measured(_spread(found), _spread(floors), count, len(others))


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    """Squared Fréchet distance of Gaussians fitted to two sets of vectors: |μx − μy|² + tr(Σx + Σy − 2 (Σx Σy)^½)
    (Dowson and Landau 1982; of features of networks: Heusel et al. 2017, arXiv:1706.08500).

    With AᵀA = Σx and BᵀB = Σy the last trace is the sum of the singular values of A Bᵀ: no root of a matrix, and
    singular covariances (fewer vectors than dimensions) do no harm. Few vectors make it too large: see `against_floor`.

    Args:
        x: [n, d], n at least 2; y: [m, d], m at least 2.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    gap = x.mean(axis=0) - y.mean(axis=0)
    a, b = _root(x), _root(y)
    shared = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return max(0.0, float(gap @ gap + np.square(a).sum() + np.square(b).sum() - 2 * shared))


def _root(x: np.ndarray) -> np.ndarray:
    """A with AᵀA the covariance (unbiased) of the rows, at most as many rows as columns."""
    centred = (x - x.mean(axis=0)) / np.sqrt(len(x) - 1)
    return np.asarray(np.linalg.qr(centred, mode="r")) if len(x) > x.shape[1] else centred


def kernel_distance(x: np.ndarray, y: np.ndarray, seed: int = 0) -> KernelDistance:
    """KID (Bińkowski et al. 2018, arXiv:1801.01401): unbiased MMD² with the kernel (x·y/d + 1)³, mean over disjoint
    blocks of at most `MOST_IN_BLOCK` vectors. May be below zero; its expectation is zero where the distributions are
    the same.

    Args:
        x: [n, d]; y: [m, d], at least 2 of each.
    """
    fewest = min(len(x), len(y))
    blocks = max(1, min(BLOCKS, fewest // LEAST_IN_BLOCK), fewest // MOST_IN_BLOCK)
    rng = np.random.default_rng(seed)
    parts = [np.array_split(rng.permutation(len(each)), blocks) for each in (x, y)]
    values = [mmd2(x[i[:MOST_IN_BLOCK]], y[j[:MOST_IN_BLOCK]]) for i, j in zip(*parts)]
    error = float(np.std(values, ddof=1) / np.sqrt(blocks)) if blocks > 1 else None
    return KernelDistance(float(np.mean(values)), error, blocks)


def mmd2(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased estimate of the squared maximum mean discrepancy (Gretton et al. 2012, lemma 6) with KID's kernel."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    within = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (_kernel(x, x), _kernel(y, y))]
    return float(sum(within) - 2 * _kernel(x, y).mean())


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def kolmogorov_smirnov(x: np.ndarray, y: np.ndarray) -> float:
    """Largest difference of the two empirical distribution functions, 0..1."""
    _, f, g = _functions(x, y)
    return float(np.abs(f - g).max())


def wasserstein(x: np.ndarray, y: np.ndarray) -> float:
    """The first Wasserstein distance, in the unit of the numbers: the area between the two distribution functions."""
    at, f, g = _functions(x, y)
    return float((np.abs(f - g)[:-1] * np.diff(at)).sum())


def _functions(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All numbers in order, and both distribution functions there."""
    at = np.sort(np.concatenate([x, y]).astype(np.float64))
    f, g = (np.searchsorted(np.sort(each.astype(np.float64)), at, side="right") / len(each) for each in (x, y))
    return at, f, g


def _spread(values: list[float]) -> Spread:
    return Spread(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0)
