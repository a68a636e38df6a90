"""Presets: one for each command of Open-Sora 2.0's README, with its numbers."""

from __future__ import annotations

import re

import pytest

from datakit.errors import ConfigError
from datakit.weights.registry import MODELS
from sampler.generation.video_size import check_frames, size_of
from sampler.settings import PRESETS, SampleSettings, load_settings
from trainer.planning.latent_grid import LatentGrid
from trainer.settings import DiTSettings
from trainer.settings import load_settings as load_training

OPEN_SORA = {
    "256px": ("t2v", False, (192, 336)),
    "768px": ("t2v", False, (576, 1024)),
    "t2i2v-256px": ("t2v", True, (192, 336)),
    "t2i2v-768px": ("t2v", True, (576, 1024)),
    "i2v-256px": ("i2v_head", False, (192, 336)),
    "i2v-768px": ("i2v_head", False, (576, 1024)),
    "high-compression": ("t2v", True, (576, 1024)),
}
"""Mode, whether a model paints the first frame, height and width."""
COMPRESSION = {"hunyuan": (4, 8, True, 2), "dc-ae": (4, 32, False, 1)}
"""Of an autoencoder: frames, pixels a side, causal; and the patch of its model."""
FILES = {preset.stem: preset.read_text() for preset in PRESETS.glob("*.yaml")}


def test_there_is_one_for_each_command():
    assert set(FILES) == {*OPEN_SORA, "tiny"}


@pytest.mark.parametrize("name", OPEN_SORA)
def test_numbers_are_open_soras(name):
    mode, painted, size = OPEN_SORA[name]
    found = load_settings(name)
    kind = found.autoencoder.kind
    time, side, causal, patch = COMPRESSION[kind]
    assert kind == ("dc-ae" if name == "high-compression" else "hunyuan") and found.text.kind == "t5-clip"
    assert (
        found.video.mode == mode
        and size_of(found.video.resolution, found.video.aspect_ratio, (side * patch,) * 2) == size
    )
    check_frames(found.video.num_frames, LatentGrid((time, side, side), causal), 129)
    assert found.video.num_frames == (129 if causal else 128) and found.video.fps == 24
    own = found.sampling
    assert (own.steps, own.guidance, own.image_guidance) == (50, 7.5, 3.0)
    assert own.oscillate and own.image_over_frames and own.shift is None
    assert found.prompt.motion == 4 and not found.prompt.refine and found.seed == 42 and found.samples == 1
    assert (found.image.model is not None) == painted
    assert {found.autoencoder.weights, *([found.image.model] if painted else [])} <= set(MODELS)
    if painted:
        assert MODELS[found.image.model].kind == "text to image" and (found.image.steps, found.image.guidance) == (
            50,
            4.0,
        )


def test_pairs_differ_in_nothing_but_the_resolution():
    for kind in ("", "t2i2v-", "i2v-"):
        small, large = (load_settings(f"{kind}{size}px").model_dump() for size in (256, 768))
        assert (small["video"].pop("resolution"), large["video"].pop("resolution")) == ("256px", "768px")
        assert small == large


def test_tiny_goes_with_the_trainers():
    found, trained = load_settings("tiny"), load_training(DiTSettings, "tiny")
    assert found.autoencoder is found.text is found.image.model is None and found.video == SampleSettings().video
    assert (
        (found.sampling.steps, found.sampling.guidance)
        == (trained.preview.steps, trained.preview.guidance)
        == (20, 2.0)
    )
    assert found.work.precision == trained.engine.precision == "fp32"


@pytest.mark.parametrize("name", sorted(FILES))
def test_comments_hold(name):
    """Their examples are of this preset, and what they set can be set."""
    text = FILES[name]
    commands = re.findall(r"^#   (datakit sample .*)$", text, re.M)
    assert commands and all(f"--preset {name} " in command and "--ckpt " in command for command in commands)
    for setting in re.findall(r"--set ([\w.]+=\w+)", text):
        assert load_settings(name, None, [setting]) != load_settings(name), setting


def test_options_lie_over_presets(tmp_path):
    (tmp_path / "own.yaml").write_text("video: {num_frames: 65}\n")
    found = load_settings(
        "256px", tmp_path / "own.yaml", ["work.offload=true", "prompt.motion=auto", "prompt.refine=true"]
    )
    assert found.video.num_frames == 65 and found.video.resolution == "256px" and found.work.offload
    assert found.prompt.motion == "auto" and found.prompt.refine
    with pytest.raises(ConfigError, match="there is no preset 512px: there are .*256px"):
        load_settings("512px")
