"""HunyuanVideo's autoencoder against what the reference computed (tests/data/golden)."""

import builtins
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from datakit.errors import MissingDependency
from trainer.models.autoencoders.build import build_autoencoder
from trainer.models.autoencoders.tiling import Tiles

GOLDEN = Path(__file__).parents[2] / "data" / "golden"


@pytest.fixture(scope="module")
def golden():
    """Model with its weights, and the tensors."""
    with safe_open(GOLDEN / "hunyuan_vae_tiny.safetensors", "pt") as file:
        about = {k: json.loads(v) for k, v in file.metadata().items()}
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    model = build_autoencoder(
        "hunyuan",
        latent_channels=about["latent_channels"],
        widths=tuple(about["block_out_channels"]),
        layers=about["layers_per_block"],
        groups=about["norm_num_groups"],
    )
    assert (model.scale, model.shift) == (about["scale_factor"], about["shift_factor"])
    assert model.compression == (about["time_compression_ratio"], *2 * (about["spatial_compression_ratio"],))
    assert model.tiles == Tiles(
        about["sample_tsize"], about["sample_size"], about["sample_size"], about["tile_overlap_factor"]
    )
    model.load_state_dict({k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")})
    return model, tensors


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-4 * max(1.0, expected.abs().max().item())


@torch.no_grad()
def test_latents_and_videos_are_those_of_the_reference(golden):
    model, tensors = golden
    encoded = model.encode(tensors["inputs.video"])
    assert_close(encoded.mean, tensors["expected.latent_mean_scaled"])
    assert_close(2 * (encoded.std / model.scale).log(), tensors["expected.logvar"])
    assert_close(model.decode(tensors["expected.latent_mean_scaled"]), tensors["expected.decoded"])


def test_the_full_model_has_the_keys_and_shapes_of_the_released_one():
    with torch.device("meta"):
        model = build_autoencoder("hunyuan")
    released = {}
    for line in (GOLDEN / "hunyuan_vae_keys.tsv").read_text().splitlines():
        key, shape = line.split("\t")
        released[key] = tuple(int(n) for n in shape.split("x"))
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == released and len(released) == 248
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 246.5
    assert (model.channels, model.scale, model.shift, model.compression) == (16, 0.476986, 0, (4, 8, 8))
    model.load_state_dict({key: torch.empty(shape, device="meta") for key, shape in released.items()})
    with torch.device("meta"):
        encoded = model.encode(torch.empty(1, 3, 17, 64, 96))
        assert encoded.mean.shape == encoded.std.shape == (1, *model.latent_shape(17, 64, 96)) == (1, 16, 5, 8, 12)
        assert model.decode(encoded.mean).shape == (1, 3, 17, 64, 96)


def test_without_diffusers_it_says_how_to_get_it(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "diffusers":
            raise ModuleNotFoundError("No module named 'diffusers'", name="diffusers")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingDependency, match="needs diffusers: uv sync --inexact --extra train"):
        build_autoencoder("hunyuan")
