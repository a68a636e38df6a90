"""The MMDiT's checkpoints: Open-Sora 2.0's and Flux's are recognised, loaded in both layouts, and exported bit for
bit."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

from datakit.errors import ConfigError
from support.mmdit_golden import GOLDEN, close, golden, same
from trainer.models.common.weights import WeightsError, load_weights
from trainer.models.mmdit.checkpoint_io import (
    axes_of,
    config_of,
    export_open_sora,
    layout_of,
    load_mmdit,
    open_sora_state,
)
from trainer.models.mmdit.model import MMDiT, MMDiTConfig


def released() -> dict[str, torch.Tensor]:
    """Open-Sora 2.0's names and shapes."""
    rows = (line.split("\t") for line in (GOLDEN / "opensora_v2_keys.tsv").read_text().splitlines())
    return {name: torch.empty([int(n) for n in shape.split("x")], device="meta") for name, shape in rows}


def flux() -> dict[str, torch.Tensor]:
    """Names and shapes of flux1-dev.safetensors (black-forest-labs/flux, model.py)."""
    state, width = {}, 3072

    def linear(name, out, size):
        state[f"{name}.weight"], state[f"{name}.bias"] = (
            torch.empty(out, size, device="meta"),
            torch.empty(out, device="meta"),
        )

    def norm(name):
        for part in ("query_norm", "key_norm"):
            state[f"{name}.norm.{part}.scale"] = torch.empty(128, device="meta")

    for name, size in (("img_in", 64), ("txt_in", 4096)):
        linear(name, width, size)
    for name, size in (("time_in", 256), ("guidance_in", 256), ("vector_in", 768)):
        linear(f"{name}.in_layer", width, size)
        linear(f"{name}.out_layer", width, width)
    for i in range(19):
        for stream in ("img", "txt"):
            stem = f"double_blocks.{i}.{stream}"
            linear(f"{stem}_mod.lin", 6 * width, width)
            linear(f"{stem}_attn.qkv", 3 * width, width)
            norm(f"{stem}_attn")
            linear(f"{stem}_attn.proj", width, width)
            linear(f"{stem}_mlp.0", 4 * width, width)
            linear(f"{stem}_mlp.2", width, 4 * width)
    for i in range(38):
        stem = f"single_blocks.{i}"
        linear(f"{stem}.linear1", 7 * width, width)
        linear(f"{stem}.linear2", width, 5 * width)
        norm(stem)
        linear(f"{stem}.modulation.lin", 3 * width, width)
    linear("final_layer.linear", 64, width)
    linear("final_layer.adaLN_modulation.1", 2 * width, width)
    return state


def shapes(state) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def test_the_released_models_are_recognised_by_their_shapes():
    assert config_of(released()) == MMDiTConfig()
    state = flux()
    assert len(state) == 780 and sum(t.numel() for t in state.values()) == 11_901_408_320
    assert config_of(state) == MMDiTConfig(guidance_embed=True, cond_embed=False, layout="fused")
    with torch.device("meta"):
        assert shapes(MMDiT(config_of(state)).state_dict()) == shapes(state)
        dense = MMDiTConfig(
            in_channels=128,
            patch_size=1,
            hidden_size=96,
            num_heads=4,
            axes_dim=axes_of(24),
            depth=1,
            depth_single_blocks=2,
            mlp_ratio=25 / 7,
            qkv_bias=False,
        )
        assert config_of(MMDiT(dense).state_dict()).mlp_size == dense.mlp_size
        assert dataclasses.replace(config_of(MMDiT(dense).state_dict()), mlp_ratio=25 / 7) == dense


@pytest.mark.parametrize("head", [8, 16, 32, 64, 96, 128, 256])
def test_axes_are_even_add_up_and_are_those_of_the_release_at_128(head):
    axes = axes_of(head)
    assert sum(axes) == head and all(a > 0 and a % 2 == 0 for a in axes) and axes_of(128) == (16, 56, 56)


def test_the_full_model_exports_under_the_released_names_and_shapes():
    with torch.device("meta"):
        model = MMDiT()
    exported = open_sora_state(model.state_dict(), model.config)
    assert shapes(exported) == shapes(released()) and len(exported) == 1082
    fused = open_sora_state(model.state_dict(), model.config, "fused")
    wanted = {k: v for k, v in shapes(flux()).items() if "guidance_in" not in k} | {
        "cond_in.weight": (3072, 68),
        "cond_in.bias": (3072,),
    }
    assert shapes(fused) == wanted


@pytest.mark.parametrize("name", ["mmdit_v2_tiny", "mmdit_flux_tiny"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.diffusion_model."])
def test_a_checkpoint_computes_what_the_reference_computed_in_both_layouts(tmp_path, name, prefix):
    state, config, inputs, velocity = golden(name)
    file = tmp_path / "w.safetensors"
    save_file({f"{prefix}{k.replace('blocks.1.', 'blocks.1._orig_mod.')}": v for k, v in state.items()}, file)
    for layout in ("separate", "fused"):
        model = load_mmdit(file, dataclasses.replace(config, layout=layout))
        assert model.config.layout == layout_of(model.state_dict()) == layout and close(model(**inputs), velocity)
    guessed = load_mmdit(file, layout="fused")
    assert guessed.config == dataclasses.replace(config, axes_dim=(4, 14, 14), layout="fused"), (
        "axes cannot be seen in shapes"
    )
    assert load_mmdit(file).config.layout == config.layout


@pytest.mark.parametrize("name", ["mmdit_v2_tiny", "mmdit_flux_tiny"])
def test_exports_come_back_bit_for_bit(tmp_path, name):
    state, config, inputs, velocity = golden(name)
    model = MMDiT(config)
    load_weights(model, state)
    export_open_sora(model, tmp_path / "own.safetensors", config.layout)
    assert same(load_file(tmp_path / "own.safetensors"), state), "what a plain reader finds"
    other = "fused" if config.layout == "separate" else "separate"
    export_open_sora(model, tmp_path / "other.safetensors", other)
    again = load_mmdit(tmp_path / "other.safetensors")
    assert again.config == dataclasses.replace(config, layout=other) and close(again(**inputs), velocity), (
        "its metadata tells the axes"
    )
    assert same(load_mmdit(tmp_path / "other.safetensors", layout=config.layout).state_dict(), state)
    export_open_sora(again, tmp_path / "back.safetensors", config.layout)
    assert same(load_file(tmp_path / "back.safetensors"), state)
    ema = {f"module.{k}": v + 1 for k, v in state.items()}
    export_open_sora(model, tmp_path / "ema.safetensors", config.layout, torch.bfloat16, ema)
    assert same(load_file(tmp_path / "ema.safetensors"), {k: (v + 1).bfloat16() for k, v in state.items()})


def test_a_model_with_a_condition_starts_from_weights_without(tmp_path):
    """As Open-Sora's training starts from Flux: the condition changes nothing at first, and the guidance is left
    behind."""
    state, config, inputs, _ = golden("mmdit_flux_tiny")
    file = tmp_path / "flux.safetensors"
    save_file(state, file)
    wanted = dataclasses.replace(config, cond_embed=True, guidance_embed=False)
    with pytest.raises(
        WeightsError, match="2 missing .cond_in.weight .64, 20., cond_in.bias .64..; 4 unexpected .guidance_in"
    ):
        load_mmdit(file, wanted)
    with pytest.raises(WeightsError, match="2 missing .cond_in"):
        load_mmdit(file, wanted, allow_unexpected=("guidance_in.*",))
    model = load_mmdit(
        file, wanted, allow_missing=("cond_in.*",), allow_unexpected=("guidance_in.*",), dtype=torch.float64
    )
    assert model.cond_in.weight.dtype == torch.float64 and not model.cond_in.weight.any()
    without = load_mmdit(file, dataclasses.replace(config, guidance_embed=False), allow_unexpected=("guidance_in.*",))
    args = {k: v for k, v in inputs.items() if k != "guidance"}
    cond = torch.randn(*args["img"].shape[:2], 20)
    assert torch.allclose(model.float()(**args, cond=cond), without(**args), atol=1e-6)
    with pytest.raises(WeightsError, match="of another shape .txt_in.weight"):
        load_mmdit(file, dataclasses.replace(config, context_in_dim=48))


def test_what_is_no_mmdit_is_said(tmp_path):
    state, config, _, _ = golden("mmdit_v2_tiny")
    cases = (
        ({f"{p}.{k}": v.clone() for p in ("model", "ema") for k, v in state.items()}, "several models .ema., model.."),
        ({"x_embedder.weight": torch.ones(2, 2)}, "diffusers' names"),
        ({"conv.weight": torch.ones(2)}, "no img_in.weight, but conv.weight"),
        ({"img_in.weight": torch.ones(2, 2)}, "no norm of queries"),
        ({k: v for k, v in state.items() if "blocks" not in k or "norm" in k}, "but no blocks"),
        (
            {k: v for k, v in state.items() if k != "single_blocks.0.k_proj.bias"},
            "1 missing .single_blocks.0.k_proj.bias",
        ),
    )
    for i, (weights_, words) in enumerate(cases):
        save_file(weights_, tmp_path / f"{i}.safetensors")
        with pytest.raises(ConfigError, match=words):
            load_mmdit(tmp_path / f"{i}.safetensors", layout="fused")
    save_file(state, tmp_path / "odd.safetensors", {"datakit.mmdit": "{}"})
    with pytest.raises(ConfigError, match="give the config"):
        load_mmdit(tmp_path / "odd.safetensors")
    model = MMDiT(config)
    with pytest.raises(
        WeightsError, match="cannot export weights that are not those of the model: 1 missing .img_in.bias"
    ):
        export_open_sora(
            model, tmp_path / "x.safetensors", state={k: v for k, v in state.items() if k != "img_in.bias"}
        )
    assert not (tmp_path / "x.safetensors").exists()
