"""Video DC-AE against what Open-Sora 2.0's own code computed (tests/data/golden)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from trainer.models.autoencoders.kinds.dc_ae import DCAE, DCAEConfig
from trainer.models.autoencoders.tiling import Tiles

GOLDEN = Path(__file__).parents[2] / "data" / "golden"


@pytest.fixture(scope="module")
def golden():
    """Model with its weights, the video, the expected tensors."""
    with safe_open(GOLDEN / "dc_ae_tiny.safetensors", "pt") as file:
        about = {k: json.loads(v) for k, v in file.metadata().items()}
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    config = DCAEConfig(
        about["latent_channels"],
        tuple(about["width_list"]),
        tuple(about["encoder_depth_list"]),
        tuple(about["decoder_depth_list"]),
        tuple(kind != "ResBlock" for kind in about["block_type"]),
        tuple(about["temporal_downsample"]),
        about["scaling_factor"],
    )
    assert (config.space, config.time) == (about["spatial_compression"], about["time_compression"])
    model = DCAE(config)
    model.load_state_dict({k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")})
    return model, tensors["inputs.video"], tensors["expected.latent"], tensors["expected.decoded"]


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-4 * max(1.0, expected.abs().max().item())


@torch.no_grad()
def test_latents_and_videos_are_those_of_the_reference(golden):
    model, video, latent, decoded = golden
    encoded = model.encode(video)
    assert_close(encoded.mean, latent)
    assert not encoded.std.any() and encoded.std.shape == latent.shape
    assert_close(model.decode(latent), decoded)


def test_the_full_model_has_the_keys_and_shapes_of_the_released_one():
    with torch.device("meta"):
        model = DCAE()
    released = {}
    for line in (GOLDEN / "dc_ae_f32t4c128_keys.tsv").read_text().splitlines():
        key, shape = line.split("\t")
        released[key] = tuple(int(n) for n in shape.split("x"))
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == released and len(released) == 339
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 459.5


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 96, 32), (12, 32, 96), (8, 64, 64)])
def test_any_multiple_of_the_compression_goes_through_whole_and_in_tiles(golden, size):
    model = golden[0]
    torch.manual_seed(0)
    video = torch.rand(1, 3, *size) * 2 - 1
    latent = model.encode(video).mean
    assert latent.shape[1:] == model.latent_shape(*size) and model.decode(latent).shape == video.shape
    tiles = Tiles(8, 32, 32)
    assert model.encode(video, tiles).mean.shape == latent.shape and model.decode(latent, tiles).shape == video.shape


@torch.no_grad()
def test_an_image_is_one_frame_and_one_latent_as_in_the_reference(golden):
    """No time is halved or doubled: the networks of a frame are those of a video whose time factors are all 1."""
    model, video, _, _ = golden
    config = model.config
    still = DCAE(DCAEConfig(**{**vars(config), "halves_time": (False,) * 6}))
    # a convolution over one frame with stride 2 in time is one with stride 1
    still.load_state_dict(model.state_dict())
    image = video[:, :, :1]
    latent = model.encode(image).mean
    assert latent.shape[1:] == model.latent_shape(1, 64, 96) == (16, 1, 2, 3)
    assert_close(latent, still.encode(image).mean)
    assert model.decode(latent).shape == image.shape
    assert_close(model.decode(latent), still.decode(latent))
