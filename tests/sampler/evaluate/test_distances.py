"""Distances whose answers are known: closed forms, sums by hand, and what noise floors must do."""

import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from sampler.evaluate.distances import against_floor, frechet, kernel_distance, kolmogorov_smirnov, mmd2, wasserstein


def with_moments(count: int, mean: np.ndarray, covariance: np.ndarray, seed: int = 0) -> np.ndarray:
    """Vectors whose mean and (unbiased) covariance are exactly these."""
    x = np.random.default_rng(seed).normal(size=(count, len(mean)))
    x -= x.mean(axis=0)
    whitening = np.linalg.inv(np.linalg.cholesky(np.cov(x.T)))
    return x @ whitening.T @ np.linalg.cholesky(covariance).T + mean


def root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.sqrt(values) @ vectors.T


def test_frechet_of_known_gaussians_is_the_closed_form():
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 4.0, 1.0])
    x = with_moments(50, np.array([0.0, 1.0, 2.0]), np.diag(a))
    y = with_moments(80, np.array([3.0, 1.0, -2.0]), np.diag(b), 1)
    assert frechet(x, y) == pytest.approx(9 + 16 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-9)
    assert frechet(x, x) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("counts", [(40, 60), (9, 60), (5, 6)], ids=["full rank", "one singular", "both singular"])
def test_frechet_is_that_of_roots_of_matrices_whatever_the_rank(counts):
    rng = np.random.default_rng(3)
    x, y = (rng.normal(size=(n, 12)) @ rng.normal(size=(12, 12)) for n in counts)
    first, second = np.cov(x.T), np.cov(y.T)
    inner = root(first + 1e-13 * np.eye(12)) @ second @ root(first + 1e-13 * np.eye(12))
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh((inner + inner.T) / 2), 0)).sum()
    gap = x.mean(0) - y.mean(0)
    assert frechet(x, y) == pytest.approx(gap @ gap + np.trace(first) + np.trace(second) - 2 * shared, rel=1e-4)
    assert frechet(x, y) == pytest.approx(frechet(y, x), rel=1e-9)


def test_mmd_is_the_sum_by_hand():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(4, 3)), rng.normal(size=(5, 3)) + 1

    def k(a, b):
        return (a @ b / 3 + 1) ** 3

    xx = [k(x[i], x[j]) for i in range(4) for j in range(4) if i != j]
    yy = [k(y[i], y[j]) for i in range(5) for j in range(5) if i != j]
    xy = [k(a, b) for a in x for b in y]
    assert mmd2(x, y) == pytest.approx(np.mean(xx) + np.mean(yy) - 2 * np.mean(xy))


def test_kernel_distance_is_unbiased_and_finds_the_moments():
    # in one dimension (xy + 1)³ compares three moments: MMD² = 3 Δm₁² + 3 Δm₂² + Δm₃²
    rng = np.random.default_rng(1)
    for shift in (0.0, 0.5, 1.0):
        known = 3 * shift**2 + 3 * shift**4 + (shift**3 + 3 * shift) ** 2
        found = [
            kernel_distance(rng.normal(size=(40, 1)), rng.normal(size=(60, 1)) + shift, seed).mean
            for seed in range(300)
        ]
        assert np.mean(found) == pytest.approx(known, abs=4 * np.std(found) / np.sqrt(len(found)))
        if shift == 0:
            assert min(found) < 0 < max(found), "an unbiased estimate of zero lies on both sides"


def test_the_standard_error_of_the_kernel_distance_is_its_spread():
    rng = np.random.default_rng(2)
    found = [kernel_distance(rng.normal(size=(200, 4)), rng.normal(size=(200, 4)) + 0.3, seed) for seed in range(100)]
    assert found[0].blocks == 10
    assert np.mean([d.error for d in found]) == pytest.approx(np.std([d.mean for d in found]), rel=0.3)
    few = kernel_distance(rng.normal(size=(3, 4)), rng.normal(size=(50, 4)))
    assert few.blocks == 1 and few.error is None


def test_both_grow_with_the_shift():
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(60, 16)), rng.normal(size=(90, 16))
    for distance in (frechet, lambda a, b: kernel_distance(a, b).mean):
        values = [distance(x + shift, y) for shift in (0.0, 0.3, 0.6, 1.2, 2.4)]
        assert values == sorted(values)


def test_distances_of_numbers():
    x = np.arange(100.0)
    assert wasserstein(x, x + 7.5) == pytest.approx(7.5) and wasserstein(x, 2 * x) == pytest.approx(x.mean())
    assert wasserstein(np.array([0.0]), np.array([0.0, 1.0])) == pytest.approx(0.5)
    assert kolmogorov_smirnov(x, x) == 0 and kolmogorov_smirnov(x, x + 25) == pytest.approx(0.25)
    assert kolmogorov_smirnov(x, x + 1000) == 1 and kolmogorov_smirnov(np.zeros(3), np.zeros(9)) == 0


def test_distances_are_those_of_scipy():
    rng = np.random.default_rng(7)
    x, y = rng.normal(size=300).round(1), rng.normal(0.2, 1.3, size=500).round(1)  # rounded: many are equal
    assert kolmogorov_smirnov(x, y) == pytest.approx(scipy.stats.ks_2samp(x, y).statistic, abs=1e-12)
    assert wasserstein(x, y) == pytest.approx(scipy.stats.wasserstein_distance(x, y), abs=1e-12)
    a, b = rng.normal(size=(300, 24)), rng.normal(0.2, 1.3, size=(500, 24)) @ rng.normal(size=(24, 24))
    gap, first, second = a.mean(0) - b.mean(0), np.cov(a.T), np.cov(b.T)
    expected = gap @ gap + np.trace(first + second - 2 * scipy.linalg.sqrtm(first @ second).real)
    assert frechet(a, b) == pytest.approx(expected, rel=1e-10)


def test_the_floor_is_what_real_ones_get():
    rng = np.random.default_rng(5)
    real, same, other = rng.normal(size=(80, 32)), rng.normal(size=(20, 32)), rng.normal(size=(20, 32)) + 1.0
    near, far = (against_floor(each, real, frechet, 12, 0) for each in (same, other))
    assert near.count == far.count == 20 and near.others == 60
    assert near.floor == far.floor, "the same splits"
    assert (
        abs(near.value.mean - near.floor.mean) < 4 * near.floor.std
        and far.value.mean > far.floor.mean + 20 * far.floor.std
    )
    fewer = against_floor(same[:6], real, frechet, 12, 0)
    assert fewer.floor.mean > near.floor.mean, "the fewer, the larger"
    assert against_floor(same, real, frechet, 12, 0) == near and against_floor(same, real, frechet, 12, 1) != near


def test_more_samples_than_half_of_the_real_ones_are_drawn_from():
    rng = np.random.default_rng(6)
    found = against_floor(rng.normal(size=500), rng.normal(size=40), wasserstein, 10, 0)
    assert (found.count, found.others) == (20, 20) and found.value.std > 0
    assert against_floor(rng.normal(size=1), rng.normal(size=1), wasserstein, 10, 0) is None
    assert against_floor(rng.normal(size=(1, 4)), rng.normal(size=(40, 4)), frechet, 10, 0, 2) is None
