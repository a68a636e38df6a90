"""A new architecture is a new package: here one of a single linear layer, which nothing else names. It is found in
settings, trained, adapted by LoRA, exported and sampled."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from datakit.config import describe, load
from datakit.errors import ConfigError
from sampler.generation.denoiser import Denoiser
from sampler.generation.model_source import load_model, open_checkpoint
from sampler.settings import SampleSettings
from support.drawn_videos import encode, texture
from support.plan_folders import bucket, window
from trainer import models
from trainer.diffusion.rectified_flow import Text
from trainer.dit.train import train_dit
from trainer.engine import Engine, EngineSettings, OptimizerSettings, join_processes
from trainer.export.dit import export_run, run_weights
from trainer.models.common.dit_architecture import ARCHITECTURES, Inputs, architecture_of
from trainer.models.common.weights import read_weights
from trainer.planning.plan import WINDOWS, Part, write_plan
from trainer.settings import DiTSettings, load_settings
from trainer.training.setup import Request

TOY = '''
from dataclasses import dataclass

import torch
from torch import nn

from trainer.models.common.dit_architecture import Architecture, Flops, Inputs
from trainer.models.common.settings import DiTModelSettings
from trainer.models.common.weights import check_weights, load_weights, read_weights


class ToySettings(DiTModelSettings):
    width: int = 8
    """Of the hidden layer."""


class Toy(nn.Module):
    """Each latent by itself, and the text's mean."""

    def __init__(self, channels, states, width):
        super().__init__()
        self.into = nn.Linear(2 * channels + 1, width)
        self.told = nn.Linear(states, width)
        self.block = nn.Sequential(nn.Linear(width, width), nn.SiLU())
        self.out = nn.Linear(width, channels)

    def forward(self, x, cond, states, t):
        assert t.dtype == torch.float32
        seen = self.into(torch.cat((x, cond), 1).movedim(1, -1)) + self.told(states.mean(1))[:, None, None, None]
        return self.out(self.block(seen) * (1 + t.to(seen)[:, None, None, None, None])).movedim(-1, 1)


@dataclass(frozen=True)
class ToyArchitecture(Architecture):
    features: int
    states: int
    width: int
    patch = 1
    head_features = 8
    takes_condition = True
    kind = "toy-dit"
    settings = ToySettings
    lora_targets = ("block.*",)
    exact_inputs = frozenset({"t"})
    layouts = ("plain", "prefixed")

    @classmethod
    def of_settings(cls, settings, inputs):
        return cls(inputs.channels, inputs.states or 384, settings.width)

    @classmethod
    def of_file(cls, source):
        state = read_weights(source)
        return cls(state["out.weight"].shape[0], state["told.weight"].shape[1], state["told.weight"].shape[0])

    @classmethod
    def recognises(cls, names):
        return "told.weight" in names

    @classmethod
    def inputs_of(cls, state, settings):
        return Inputs(state["out.weight"].shape[0], state["told.weight"].shape[1])

    @property
    def channels(self):
        return self.features

    def build(self):
        return Toy(self.channels, self.states, self.width)

    def initialise(self, model):
        nn.init.zeros_(model.told.weight)

    def load(self, source, dtype=None, allow_unexpected=None):
        model = self.build()
        load_weights(model, source)
        return model.to(dtype) if dtype else model

    def exported(self, state, layout=None):
        check_weights(self.build().state_dict(), state, "not of this toy")
        return {("model." if layout == "prefixed" else "") + name: t for name, t in state.items()}, {"toy": "yes"}

    def velocity(self, model):
        return lambda x, cond, states, pooled, t: model(x, cond, states, t=t)

    def blocks(self, model):
        return [model.block]

    def checkpoint_activations(self, model, settings):
        pass

    def shallow(self, blocks):
        return self

    def flops(self, tokens):
        return Flops(2.0 * tokens * self.width**2, 0.0)

    def memory(self):
        return {"width": self.width, "double_blocks": 0, "single_blocks": 1}
'''
SETS = (
    "model={architecture: toy-dit, width: 16}",
    "text.options={length: 8}",
    "steps=3",
    "loader.workers=0",
    "write_back=false",
    "log={every: 1, tensorboard: false}",
    "validation.every=0",
    "preview={every: 3, count: 1, steps: 2}",
    "watchdog_s=0",
    "engine.ema=null",
)


@pytest.fixture(autouse=True)
def toy(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("family")
    (folder / "toy_dit").mkdir()
    (folder / "toy_dit" / "__init__.py").write_text("")
    (folder / "toy_dit" / "architecture.py").write_text(TOY)
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(folder)])


@pytest.fixture
def plan(tmp_path) -> Path:
    rows = []
    for v in range(2):
        film = encode(tmp_path / f"{v}.mp4", [np.roll(texture(32, 32, v), 2 * i, 1) for i in range(5)], 24)
        crop = {"crop_width": 32, "crop_height": 32, "width": 32, "height": 32}
        about = {"clip_id": f"clip{v}", "uri": str(film), "time_base": "1/12288", "end_pts": 5 * 512, "fps": 24.0}
        rows.append(window(0, f"video {v}", **crop, **about))
    parts, fitting = (
        [Part("all", 1.0, {"content_hash": "0"}, "")],
        {"compression": [4, 8, 8], "causal": True, "patch": 1},
    )
    shapes = [bucket(2, 5, 32, 32, tokens=2 * 16 + 8)]
    write_plan(tmp_path / "plan", shapes, parts, fitting, 1, {}, [pa.RecordBatch.from_pylist(rows, schema=WINDOWS)], [])
    return tmp_path / "plan"


def settings_for(*sets: str) -> DiTSettings:
    """Those of the preset `tiny`, but for its model."""
    return load(DiTSettings, None, ["autoencoder.kind=tiny", "text.kind=minilm", "engine.precision=fp32", *SETS, *sets])


def test_settings_are_those_of_the_architecture_that_they_name():
    assert ARCHITECTURES.names() == ("mmdit", "toy-dit")
    settings = settings_for()
    assert settings.model.width == 16 and DiTSettings.model_validate(settings.model_dump(mode="json")) == settings
    assert load_settings(DiTSettings, "tiny").model.architecture == "mmdit", "as before there were others"
    for sets, words in (
        (["model.hidden_size=3"], "unknown setting model.hidden_size: there are: architecture, weights, lora, width"),
        (["model.widht=3"], "unknown setting model.widht: did you mean width?"),
        (["model.architecture=wan"], "model.architecture: Input should be 'mmdit' or 'toy-dit' \\(got 'wan'\\)"),
        (["model.lora.rank=2"], "set model.weights"),
    ):
        with pytest.raises(ConfigError, match=words):
            settings_for(*sets)
    listed = {each.name: each for each in describe(DiTSettings)}
    assert listed["model.architecture"].type == "mmdit | toy-dit" and "model.hidden_size" in listed


def test_it_trains_is_exported_adapted_and_sampled(plan, tmp_path):
    settings = settings_for()
    ended = train_dit(Request(tmp_path / "run", plan=plan, quiet=True), settings)
    assert ended.step == 3 and len(list((tmp_path / "run" / "previews").rglob("*.mp4"))) == 1
    weights = run_weights(tmp_path / "run")
    assert weights.architecture == ARCHITECTURES.get("toy-dit").of_settings(settings.model, Inputs(16, 384))
    assert weights.state["told.weight"].abs().sum() > 0, "it was zero at first"

    export_run(tmp_path / "run", tmp_path / "plain.safetensors", dtype=torch.float32)
    export_run(tmp_path / "run", tmp_path / "prefixed.safetensors", layout="prefixed")
    assert all(name.startswith("model.") for name in read_weights(tmp_path / "prefixed.safetensors"))
    with pytest.raises(ConfigError, match="--layout fused: toy-dit has plain, prefixed"):
        export_run(tmp_path / "run", tmp_path / "x.safetensors", layout="fused")
    assert architecture_of(tmp_path / "plain.safetensors") == weights.architecture
    with pytest.raises(ConfigError, match="holds no MMDiT"):
        architecture_of(tmp_path / "prefixed.safetensors")

    lora = settings_for(f"model.weights={tmp_path / 'plain.safetensors'}", "model.lora={rank: 2}", "preview.every=0")
    train_dit(Request(tmp_path / "lora", plan=plan, quiet=True), lora)
    adapted = run_weights(tmp_path / "lora")
    changed = {name for name in weights.state if not torch.equal(weights.state[name], adapted.state[name])}
    assert changed == {"block.0.weight"}

    for ckpt in (tmp_path / "run", tmp_path / "plain.safetensors"):
        sampling = load(SampleSettings, None, ["autoencoder.kind=tiny", "sampling.steps=2"])
        found = pickle.loads(pickle.dumps(open_checkpoint(str(ckpt), sampling)))
        assert found.architecture == weights.architecture and found.describe_autoencoder().channels == 16
        model, noise = load_model(found, sampling.model), torch.randn(1, 16, 2, 4, 4)
        text = Text(torch.randn(1, 8, 384), torch.zeros(1, 384))
        made = Denoiser(found.architecture, model, sampling.sampling)(noise, None, text, text)
        assert made.shape == noise.shape and made.isfinite().all() and not torch.equal(made, noise)


def test_what_nothing_splits_is_refused():
    architecture = ARCHITECTURES.get("toy-dit").of_settings(settings_for().model, Inputs(16, 384))
    with pytest.raises(ConfigError, match="split mmdit, not the architecture toy-dit"):
        Engine(
            architecture.build(),
            EngineSettings(plugin="hybrid", sp=2, precision="fp32"),
            OptimizerSettings(),
            join_processes(),
            architecture,
        )
