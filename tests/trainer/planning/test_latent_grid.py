"""The one rule of frames, against lists written by hand; and sizes there and back."""

from math import ceil

import pytest

from trainer.planning.latent_grid import LatentGrid

CAUSAL, PLAIN = LatentGrid((4, 8, 8), True), LatentGrid((4, 32, 16), False)
FITS = {CAUSAL: [1, 5, 9, 13, 17, 21], PLAIN: [1, 8, 12, 16, 20, 24]}
LATENT = {CAUSAL: [1, 2, 3, 4, 5, 6], PLAIN: [1, 2, 3, 4, 5, 6]}


@pytest.mark.parametrize("grid", FITS)
def test_frames_that_fit(grid):
    for frames, latent in zip(FITS[grid], LATENT[grid]):
        assert grid.latent_frames(frames) == grid.latent_frames(frames, ceil) == latent
        assert grid.frames_of(latent) == frames
        assert grid.around(frames) == (frames, frames)


@pytest.mark.parametrize("grid", FITS)
def test_frames_between(grid):
    for below, above in zip(FITS[grid], FITS[grid][1:]):
        for frames in range(below + 1, above):
            assert grid.around(frames) == (below, above)
            assert grid.frames_of(grid.latent_frames(frames, ceil)) == above


def test_the_rule_in_words():
    assert CAUSAL.rule == "4k + 1 frames" and PLAIN.rule == "1 frame, or multiples of 4 from 8 on"


@pytest.mark.parametrize(
    ("grid", "size", "latent", "fits"),
    [
        (CAUSAL, (18, 60, 64), (5, 8, 8), (17, 64, 64)),
        (CAUSAL, (0, 3, 1), (1, 1, 1), (1, 8, 8)),
        (PLAIN, (4, 48, 40), (2, 2, 2), (8, 64, 32)),
        (PLAIN, (129, 33, 100), (32, 1, 6), (128, 32, 96)),
    ],
)
def test_the_nearest_size(grid, size, latent, fits):
    assert grid.nearest(*size) == latent and grid.size_of(latent) == fits
    assert grid.nearest(*fits) == latent
