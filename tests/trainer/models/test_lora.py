"""LoRA on the MMDiT: nothing at first, then alone in learning; saved so that peft and diffusers load it, merged into
plain weights."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from datakit.errors import ConfigError
from support.mmdit_golden import golden, same
from trainer.models.common.lora import LoraSettings, add_lora, load_lora, lora_state, merge_lora, save_lora
from trainer.models.common.weights import WeightsError, load_weights
from trainer.models.mmdit.architecture import MMDiTArchitecture
from trainer.models.mmdit.checkpoint_io import export_open_sora, load_mmdit
from trainer.models.mmdit.model import MMDiT

TARGETS = MMDiTArchitecture.lora_targets
SETTINGS = LoraSettings(rank=4, alpha=8)
NAMES = ("mmdit_v2_tiny", "mmdit_flux_tiny")


def model_and_inputs(name: str = NAMES[0]):
    state, config, inputs, _ = golden(name)
    model = MMDiT(config).eval()
    load_weights(model, state)
    return model, inputs


def trained(model: nn.Module, inputs: dict, steps: int = 3) -> nn.Module:
    """Some steps of Adam on whatever requires gradients."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**inputs).square().mean().backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def tuned():
    """A model with trained LoRA, its inputs, and what it gives."""
    model, inputs = model_and_inputs()
    add_lora(model, SETTINGS, targets=TARGETS)
    trained(model, inputs)
    with torch.no_grad():
        return model, inputs, model(**inputs)


@pytest.mark.parametrize("name, per_double, per_single", [(NAMES[0], 2 * (4 + 2), 4), (NAMES[1], 2 * (2 + 2), 2)])
def test_it_adds_nothing_at_first_and_then_learns_alone(name, per_double, per_single):
    model, inputs = model_and_inputs(name)
    plain, before = model(**inputs), {k: v.clone() for k, v in model.state_dict().items()}
    names = add_lora(model, SETTINGS, targets=TARGETS)
    assert len(names) == len(set(names)) == 2 * per_double + 2 * per_single and isinstance(model, MMDiT)
    assert torch.equal(model(**inputs), plain)
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trains == {f"{n}.lora_{f}.default.weight" for n in names for f in "AB"}
    trained(model, inputs)
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad) and not torch.equal(
        model(**inputs), plain
    )
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    base = {k.replace(".base_layer", ""): v for k, v in model.state_dict().items() if ".lora_" not in k}
    assert same(base, before), "the model itself moved"
    state = lora_state(model)
    assert {n: tuple(t.shape) for n, t in state.items() if n.startswith(names[0])} == {
        f"{names[0]}.lora_A.weight": (4, 64),
        f"{names[0]}.lora_B.weight": (model.get_submodule(names[0]).out_features, 4),
    }
    gathered = {k: v + 1 for k, v in model.state_dict().items()}
    assert same(lora_state(model, gathered), {k: v + 1 for k, v in state.items()})


def test_the_first_factors_depend_on_the_seed_alone():
    def factors(seed, noise):
        model, _ = model_and_inputs()
        torch.manual_seed(noise)
        add_lora(model, SETTINGS, seed, TARGETS)
        return lora_state(model), torch.rand(1)

    one, other, third = factors(1, 5), factors(1, 6), factors(2, 5)
    assert same(one[0], other[0]) and not same(one[0], third[0])
    torch.manual_seed(5)
    assert one[1] == torch.rand(1), "the generator of everything else moved"


def test_targets_are_patterns_and_one_that_matches_nothing_is_an_error():
    model, _ = model_and_inputs()
    with pytest.raises(ConfigError, match=r"no linear of MMDiT matches \*.qkv; there are img_in, time_in.in_layer"):
        add_lora(model, LoraSettings(targets=("*_attn.proj", "*.qkv")))
    with pytest.raises(ConfigError, match="no linear of Sequential matches double_blocks"):
        add_lora(nn.Sequential(nn.Linear(2, 2)), targets=TARGETS)
    assert add_lora(model, LoraSettings(rank=2, targets=("single_blocks.1.linear2", "*.img_attn.q_proj"))) == [
        "double_blocks.0.img_attn.q_proj",
        "double_blocks.1.img_attn.q_proj",
        "single_blocks.1.linear2",
    ]
    with pytest.raises(ConfigError, match="has LoRA already"):
        add_lora(model, targets=TARGETS)
    for function in (merge_lora, lora_state):
        with pytest.raises(ConfigError, match="has no LoRA"):
            function(model_and_inputs()[0])


def test_the_scale_is_alpha_by_rank_and_dropout_is_for_training_only():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3))
    x, weight = torch.randn(2, 5), model[0].weight.clone()
    add_lora(model, LoraSettings(rank=2, alpha=6, dropout=0.5, targets=("0",)))
    a, b = lora_state(model).values()
    with torch.no_grad():
        b.copy_(torch.randn(3, 2))
        expected = nn.functional.linear(x, weight + 3 * b @ a, model[0].bias)
    assert torch.allclose(model.eval()(x), expected, atol=1e-6) and not torch.allclose(
        model.train()(x), expected, atol=1e-3
    )


def test_merged_it_computes_the_same_under_the_original_names(tuned, tmp_path):
    model, inputs, tuned_out = tuned
    save_lora(model, tmp_path / "lora")
    other, _ = model_and_inputs()
    plain, names = other(**inputs), set(other.state_dict())
    load_lora(other, tmp_path / "lora")
    with pytest.raises(ConfigError, match="merge_lora first, or save_lora"):
        export_open_sora(other, tmp_path / "x.safetensors")
    merge_lora(other)
    assert set(other.state_dict()) == names and all(
        type(m).__module__.startswith(("torch", "trainer")) for m in other.modules()
    )
    assert torch.allclose(other(**inputs), tuned_out, atol=1e-5) and not torch.allclose(plain, tuned_out, atol=1e-3)
    assert all(p.requires_grad for p in other.parameters())
    export_open_sora(other, tmp_path / "merged.safetensors", "fused")
    assert torch.allclose(load_mmdit(tmp_path / "merged.safetensors")(**inputs), tuned_out, atol=1e-5)
    add_lora(other, SETTINGS, targets=TARGETS)  # and again


def test_what_is_not_finite_is_not_merged():
    model, _ = model_and_inputs()
    names = add_lora(model, SETTINGS, targets=TARGETS)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        model.get_submodule(names[-1]).lora_B["default"].weight[0, 0] = float("nan")
    with pytest.raises(
        ConfigError, match=f"not finite .{names[-1]}.lora_B.weight …., 1 of its tensors: nothing was merged"
    ):
        merge_lora(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if "lora_B" not in k)


@pytest.mark.parametrize("place", ["lora", "lora.safetensors"])
def test_it_comes_back_as_it_was_and_can_be_trained_on(tuned, tmp_path, place):
    model, _, out = tuned
    save_lora(model, tmp_path / place)
    other, inputs = model_and_inputs()
    names = load_lora(other, tmp_path / place)
    assert same(lora_state(other), lora_state(model)) and torch.equal(other(**inputs), out) and len(names) == 32
    trains = {n for n, p in other.named_parameters() if p.requires_grad}
    assert len(trains) == 64 and all(".lora_" in n for n in trains)
    assert not torch.equal(trained(other, inputs, 1)(**inputs), out)


def test_peft_loads_the_folder_and_we_load_what_peft_saves(tuned, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    model, inputs, out = tuned
    save_lora(model, tmp_path / "ours")
    other, _ = model_and_inputs()
    assert torch.equal(PeftModel.from_pretrained(other, tmp_path / "ours")(**inputs), out)
    theirs = get_peft_model(
        model_and_inputs()[0],
        LoraConfig(
            r=3,
            lora_alpha=7,
            target_modules=["q_proj", "linear2"],
            init_lora_weights=False,
            rank_pattern={"linear2": 5},
            use_rslora=True,
        ),
    )
    theirs.save_pretrained(tmp_path / "theirs")
    again, _ = model_and_inputs()
    load_lora(again, tmp_path / "theirs")
    assert torch.equal(again(**inputs), theirs(**inputs))


def test_diffusers_loads_the_file_and_we_load_what_diffusers_saves(tuned, tmp_path):
    from diffusers.loaders.peft import PeftAdapterMixin

    class Model(MMDiT, PeftAdapterMixin):
        _optionally_disable_offloading = classmethod(
            lambda cls, pipeline: (False, False, False)
        )  # a part of diffusers' models

    model, inputs, out = tuned
    save_lora(model, tmp_path / "lora.safetensors")
    state, config, _, _ = golden(NAMES[0])
    theirs = Model(config).eval()
    load_weights(theirs, state)
    theirs.load_lora_adapter(str(tmp_path), weight_name="lora.safetensors", prefix="transformer", use_safetensors=True)
    assert torch.equal(theirs(**inputs), out)
    theirs.save_lora_adapter(tmp_path / "diffusers", "default_0", weight_name="pytorch_lora_weights.safetensors")
    again, _ = model_and_inputs()
    load_lora(again, tmp_path / "diffusers")
    assert torch.equal(again(**inputs), out)


def test_without_a_config_ranks_are_those_of_the_tensors_and_the_scale_is_one(tuned, tmp_path):
    torch.manual_seed(0)
    ranks = {"single_blocks.0.q_proj": 2, "single_blocks.1.q_proj": 2, "double_blocks.0.img_attn.proj": 5}
    lora = {
        f"{n}.lora_{f}.weight": torch.randn(*((r, 64) if f == "A" else (64, r))) for n, r in ranks.items() for f in "AB"
    }
    save_file(lora, tmp_path / "plain.safetensors")
    model, inputs = model_and_inputs()
    expected = {
        n: model.get_submodule(n).weight + lora[f"{n}.lora_B.weight"] @ lora[f"{n}.lora_A.weight"] for n in ranks
    }
    assert load_lora(model, tmp_path / "plain.safetensors") == sorted(ranks)
    merge_lora(model)
    assert all(torch.allclose(model.get_submodule(n).weight, w, atol=1e-5) for n, w in expected.items())


def test_lora_that_does_not_fit_leaves_the_model_as_it_was(tuned, tmp_path):
    file = tmp_path / "lora.safetensors"
    save_lora(tuned[0], file)
    whole, about = load_file(file), {"lora_adapter_metadata": json.dumps({"r": 4, "lora_alpha": 8})}
    first = next(iter(whole))
    cases = (
        (
            {k: v for k, v in whole.items() if k != first},
            WeightsError,
            f"1 missing .{first.removeprefix('transformer.')} .4, 64.",
        ),
        (whole | {first: torch.ones(4, 65)}, WeightsError, "1 of another shape .*wanted .4, 64."),
        (
            {"transformer.img_out.lora_A.weight": torch.ones(4, 64)},
            ConfigError,
            "of 1 linears that the model has not .img_out.",
        ),
        ({"lora_unet_x.lora_down.weight": torch.ones(1)}, ConfigError, "no name of peft's or diffusers'"),
    )
    for i, (state, error, words) in enumerate(cases):
        save_file(state, tmp_path / f"{i}.safetensors", about)
        model, inputs = model_and_inputs()
        before, plain = {k: v.clone() for k, v in model.state_dict().items()}, model(**inputs)
        with pytest.raises(error, match=words):
            load_lora(model, tmp_path / f"{i}.safetensors")
        assert (
            same(model.state_dict(), before)
            and torch.equal(model(**inputs), plain)
            and not hasattr(model, "peft_config")
        )
    with pytest.raises(ConfigError, match="another layout"):
        load_lora(model_and_inputs(NAMES[1])[0], file)
    for about, words in (
        ('{"peft_type": "LOKR"}', "is LOKR, not LoRA"),
        ("{", "cannot be read"),
        ('{"rank_pattern": {"linear2": 0}}', "peft does not take this config"),
        ('{"r": "x"}', "peft does not take"),
        ('{"use_dora": true, "peft_version": "1", "init_lora_weights": "pissa"}', "with use_dora, init_lora_weights,"),
    ):
        save_file(whole, tmp_path / "odd.safetensors", {"lora_adapter_metadata": about})
        model, _ = model_and_inputs()
        with pytest.raises(ConfigError, match=words):
            load_lora(model, tmp_path / "odd.safetensors")
        assert same(model.state_dict(), before)
    save_file({k: v for k, v in whole.items() if "lora_B" in k}, tmp_path / "half.safetensors")
    with pytest.raises(WeightsError, match="32 missing"):
        load_lora(model_and_inputs()[0], tmp_path / "half.safetensors")


def test_a_model_in_bfloat16_has_lora_in_float32(tuned, tmp_path):
    """peft keeps the factors precise; merged, weights round once."""
    model, inputs, _ = tuned
    save_lora(model, tmp_path / "lora")
    half, _ = model_and_inputs()
    half.bfloat16()
    load_lora(half, tmp_path / "lora")
    state = lora_state(half)
    assert {t.dtype for t in state.values()} == {torch.float32}
    name = "single_blocks.0.q_proj"
    base = half.get_submodule(name).base_layer.weight.clone()
    merge_lora(half)
    expected = base.float() + 2 * state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]
    assert torch.equal(half.get_submodule(name).weight, expected.bfloat16())


def test_settings_refuse_what_makes_no_sense():
    from pydantic import ValidationError

    for wrong in ({"rank": 0}, {"alpha": -1}, {"dropout": 1.0}, {"ranks": 4}):
        with pytest.raises(ValidationError):
            LoraSettings(**wrong)
