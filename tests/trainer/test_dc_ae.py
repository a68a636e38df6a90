"""Video DC-AE against what Open-Sora 2.0's own code computed (tests/data/golden)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from trainer.models.dc_ae import DCAE, DCAEConfig

GOLDEN = Path(__file__).parent.parent / "data" / "golden"


@pytest.fixture(scope="module")
def golden():
    """Model with its weights, the video, the expected tensors."""
    with safe_open(GOLDEN / "dc_ae_tiny.safetensors", "pt") as file:
        about = {k: json.loads(v) for k, v in file.metadata().items()}
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    config = DCAEConfig(
        about["latent_channels"], tuple(about["width_list"]), tuple(about["encoder_depth_list"]), tuple(about["decoder_depth_list"]),
        tuple(kind != "ResBlock" for kind in about["block_type"]), tuple(about["temporal_downsample"]), about["scaling_factor"])
    assert (config.space, config.time) == (about["spatial_compression"], about["time_compression"])
    model = DCAE(config).eval()
    model.load_state_dict({k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")})
    return model, tensors["inputs.video"], tensors["expected.latent"], tensors["expected.decoded"]


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-4 * max(1.0, expected.abs().max().item())


@torch.no_grad()
def test_latents_and_videos_are_those_of_the_reference(golden):
    model, video, latent, decoded = golden
    assert_close(model.encode(video), latent)
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


def test_every_parameter_has_a_gradient(golden):
    model, video, _, _ = golden
    model.decode(model.encode(video)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("size", [(4, 32, 32), (8, 96, 32), (12, 32, 160)])
def test_any_multiple_of_the_compression_goes_through_and_others_are_named(golden, size):
    model = golden[0]
    torch.manual_seed(0)
    video = torch.rand(2, 3, *size) * 2 - 1
    latent = model.encode(video)
    assert latent.shape[1:] == model.latent_shape(*size) and model.decode(latent).shape == video.shape
    assert_close(model.encode(video[:1]), latent[:1])
    with pytest.raises(ValueError, match="multiple of 4"):
        model.encode(torch.zeros(1, 3, 5, 32, 32))
    with pytest.raises(ValueError, match="of 32"):
        model.encode(torch.zeros(1, 3, 4, 48, 32))
