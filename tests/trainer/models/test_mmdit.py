"""The MMDiT and the sampling loop against what Open-Sora 2.0's own code computed (tests/data/golden)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from trainer.diffusion.rectified_flow import (
    Guidance,
    Text,
    condition,
    denoise,
    keep_given,
    pack,
    positions,
    schedule,
    shift,
    unpack,
)
from trainer.models.mmdit.layout import to_fused, to_separate
from trainer.models.mmdit.model import MMDiT, MMDiTConfig

GOLDEN = Path(__file__).parents[2] / "data" / "golden"


def golden(name: str):
    """Model with its weights, inputs, expected tensors and settings."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        about = {k: v if k == "cond_type" else json.loads(v) for k, v in file.metadata().items()}
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    parts = {
        part: {k.split(".", 1)[1]: v for k, v in tensors.items() if k.startswith(f"{part}.")}
        for part in ("weights", "inputs", "expected")
    }
    model = MMDiT(config_of(about)).eval()
    model.load_state_dict(parts["weights"])
    return model, parts["inputs"], parts["expected"], about


def config_of(about: dict) -> MMDiTConfig:
    names = (
        "in_channels",
        "vec_in_dim",
        "context_in_dim",
        "hidden_size",
        "mlp_ratio",
        "num_heads",
        "depth",
        "depth_single_blocks",
        "theta",
        "qkv_bias",
        "guidance_embed",
        "cond_embed",
        "patch_size",
    )
    return MMDiTConfig(
        **{n: about[n] for n in names},
        axes_dim=tuple(about["axes_dim"]),
        layout="fused" if about["fused_qkv"] else "separate",
    )


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-4 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("name", ["mmdit_v2_tiny", "mmdit_flux_tiny"])
def test_a_forward_is_that_of_the_reference(name):
    model, inputs, expected, _ = golden(name)
    assert_close(model(**inputs), expected["velocity"])


@pytest.mark.parametrize("name, forwards", [("denoise_t2v_tiny", 13 * 2 + 3), ("denoise_i2v_head_tiny", 13 * 3 + 3)])
def test_the_whole_loop_is_that_of_the_reference_with_fewer_forwards(name, forwards):
    """16 steps: odd ones from the eleventh on (11, 13, 15) take one forward, the others two, or three with an image."""
    model, i, expected, about = golden(name)
    count, velocity = counting(model)
    guidance = Guidance(about["guidance"], about["guidance_img"], about["text_osci"], about["scale_temporal_osci"])
    frames, height, width = i["noise"].shape[2:]
    assert torch.allclose(schedule(16, shift(frames, height, width)), expected["timesteps"], atol=1e-9)
    cond = condition(i["mask"], i["masked_ref"])
    found = denoise(
        velocity,
        i["noise"],
        cond,
        Text(i["txt_cond"], i["vec_cond"]),
        Text(i["txt_uncond"], i["vec_uncond"]),
        16,
        guidance,
    )
    assert_close(pack(found), expected["packed_latent"])
    assert sum(count) == forwards


@pytest.mark.parametrize("given, forwards", [(False, 80), (True, 110)])
def test_fifty_steps_take_as_many_forwards_as_matter(given, forwards):
    asked = []

    def velocity(x, cond, states, pooled, t):
        asked.append(x.shape[0])
        return torch.zeros_like(x)

    noise, text = torch.randn(1, 4, 3, 8, 12), Text(torch.zeros(1, 2, 3), torch.zeros(1, 3))
    mask = torch.zeros(1, 1, 3, 8, 12)
    mask[:, :, 0] = float(given)
    out = denoise(
        velocity, noise, condition(mask, mask.expand(-1, 4, -1, -1, -1)), text, text, 50, Guidance(over_frames=given)
    )
    assert sum(asked) == forwards and torch.equal(out, noise)


def counting(model: MMDiT):
    """The model as `denoise` calls it, and the list of its batch sizes."""
    count: list[int] = []

    def velocity(x, cond, states, pooled, t):
        count.append(x.shape[0])
        batch, _, frames, height, width = x.shape
        out = model(
            pack(x),
            positions(batch, frames, height, width),
            states,
            torch.zeros(batch, states.shape[1], 3),
            t,
            pooled,
            cond=pack(cond),
        )
        return unpack(out, frames, height, width)

    return count, velocity


def test_layouts_convert_bit_for_bit_and_compute_the_same():
    for name, there, back, layout in [
        ("mmdit_v2_tiny", to_fused, to_separate, "fused"),
        ("mmdit_flux_tiny", to_separate, to_fused, "separate"),
    ]:
        model, inputs, expected, about = golden(name)
        before = model.state_dict()
        converted = there(before, about["num_heads"])
        again = back(converted, about["num_heads"])
        assert again.keys() == before.keys() and all(torch.equal(again[k], before[k]) for k in before)
        other = MMDiT(MMDiTConfig(**{**model.config.__dict__, "layout": layout}))
        other.load_state_dict(converted)
        assert_close(other(**inputs), expected["velocity"])


def test_the_full_model_has_the_keys_and_shapes_of_the_released_one():
    with torch.device("meta"):
        model = MMDiT()
    released = {}
    for line in (GOLDEN / "opensora_v2_keys.tsv").read_text().splitlines():
        key, shape = line.split("\t")
        released[key] = tuple(int(n) for n in shape.split("x"))
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == released and len(released) == 1082
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 3) == 11.891


def test_every_parameter_has_a_gradient_and_no_sample_touches_another():
    torch.manual_seed(0)
    model, inputs, _, _ = golden("mmdit_v2_tiny")
    model(**inputs).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    other = {k: v.clone() for k, v in inputs.items()}
    for key in ("img", "txt", "y_vec", "cond"):
        other[key][1] = torch.randn_like(other[key][1])
    assert torch.allclose(model(**inputs)[0], model(**other)[0], atol=1e-6)
    assert not torch.allclose(model(**inputs)[1], model(**other)[1], atol=1e-2)


def test_inputs_that_do_not_fit_the_model_are_refused():
    model, inputs, _, _ = golden("mmdit_v2_tiny")
    with pytest.raises(ValueError, match="cond_embed"):
        model(**{k: v for k, v in inputs.items() if k != "cond"})
    with pytest.raises(ValueError, match="cond_embed"):
        model(**inputs, guidance=torch.ones(2))
    with pytest.raises(ValueError, match="add up"):
        MMDiTConfig(axes_dim=(16, 16, 16))


def test_packing_goes_both_ways_and_given_frames_are_kept_for_each_sample():
    x = torch.randn(2, 5, 3, 4, 6)
    assert torch.equal(unpack(pack(x), 3, 4, 6), x) and pack(x).shape == (2, 18, 20)
    assert torch.equal(pack(x)[0, 1, :4], x[0, 0, 0, :2, 2:4].flatten())
    mask = torch.zeros(2, 1, 3, 4, 6)
    mask[0, :, 0], mask[1, :, 2] = 1, 1
    reference = torch.randn(2, 5, 3, 4, 6) * mask
    kept = keep_given(x, condition(mask, reference))
    assert torch.equal(kept[0, :, 0], reference[0, :, 0]) and torch.equal(kept[1, :, 2], reference[1, :, 2])
    assert torch.equal(kept[0, :, 1:], x[0, :, 1:]) and torch.equal(kept[1, :, :2], x[1, :, :2])


def test_shifts_are_those_of_the_paper():
    """5.74 at 256 px and 129 frames, 11.87 at 768 px; a wider token shifts by its size, not by 4."""
    assert round(shift(33, 32, 32), 2) == 5.74 and round(shift(33, 72, 128), 1) > 10
    assert shift(33, 8, 8, patch=1) == shift(33, 16, 16, patch=2)
