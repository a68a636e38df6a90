"""The model that `--ckpt` names: a training run's folder, one of its checkpoints, or weights (a file, a folder of
shards, a name)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from datakit.errors import ConfigError
from datakit.weights.registry import weights_hash
from sampler.settings import ModelSettings, SampleSettings
from trainer.models.autoencoders.base import Autoencoder
from trainer.models.autoencoders.build import describe_autoencoder, weights_of
from trainer.models.autoencoders.settings import AutoencoderSettings
from trainer.models.common.dit_architecture import ARCHITECTURES, Architecture, Inputs, architecture_of
from trainer.models.common.lora import load_lora, merge_lora
from trainer.models.common.weights import find_weights
from trainer.planning.plan import Plan
from trainer.settings import DiTSettings, TextSettings
from trainer.training.checkpoint import latest

FPS = 24.0
"""Frames per second of Open-Sora 2.0's videos."""


@dataclass(frozen=True)
class Usual:
    """What a training run saw most of."""

    num_frames: int
    height: int
    width: int
    fps: float


@dataclass(frozen=True)
class Checkpoint:
    """What there is to know before any weights are read. Plain values: it crosses process boundaries.

    Attributes:
        name: as it was given.
        place: file or folder of the weights.
        run: the training run whose checkpoint it is, if any; `place` is the checkpoint.
        hash: of the weights, LoRA included.
        architecture: of the model; of a run's, sizes that follow from its text encoder are left at their defaults.
        usual: None without a run, or where its plan is gone.
    """

    name: str
    place: str
    run: str | None
    hash: str
    architecture: Architecture
    autoencoder: AutoencoderSettings
    text: TextSettings
    usual: Usual | None

    def describe_autoencoder(self) -> Autoencoder:
        """Its sizes, without weights.

        Raises:
            ConfigError, MissingDependency: no weights are named, or not on this machine; not the autoencoder of this
                model.
        """
        own = self.autoencoder
        found = describe_autoencoder(own.kind, weights_of(own), **own.sizes)
        if found.channels != self.architecture.channels:
            raise ConfigError(
                f"{self.name} takes latents of {self.architecture.channels} channels, autoencoder {own.kind} has "
                f"{found.channels}: "
                "it was trained with another (--set autoencoder.kind=…)"
            )
        return found


def open_checkpoint(name: str, settings: SampleSettings) -> Checkpoint:
    """Find a model and what it was trained with.

    Raises:
        ConfigError, MissingDependency: nothing there, no model, no whole checkpoint.
    """
    run, place = _place(name)
    digest = weights_hash(place)
    if settings.model.lora is not None:
        digest += "+" + weights_hash(find_weights(settings.model.lora))
    if run is None:
        architecture = architecture_of(name)
        autoencoder, text, usual = settings.autoencoder or AutoencoderSettings(), settings.text or TextSettings(), None
    else:
        trained = _trained_with(run)
        autoencoder, text, usual = (
            settings.autoencoder or trained.autoencoder,
            settings.text or trained.text,
            _usual(run),
        )
        architecture = _architecture(trained)
        digest += "" if settings.model.ema else " without ema"
    folder = None if run is None else str(run)
    return Checkpoint(name, str(place), folder, digest, architecture, autoencoder, text, usual)


def load_model(checkpoint: Checkpoint, settings: ModelSettings) -> nn.Module:
    """The model, on the CPU, without gradients; the dtype of its weights as they are stored.

    Raises:
        ConfigError, WeightsError: weights that do not fit.
    """
    if checkpoint.run is None:
        model = checkpoint.architecture.load(checkpoint.place, allow_unexpected=settings.allow_unexpected)
    else:
        from trainer.export.dit import run_weights

        found = run_weights(checkpoint.run, settings.ema, _step(Path(checkpoint.place)))
        with torch.device("meta"):
            model = found.architecture.build()
        model.load_state_dict(found.state, assign=True)
    if settings.lora is not None:
        load_lora(model, settings.lora)
        merge_lora(model)
    return model.requires_grad_(False).eval()


def _place(name: str) -> tuple[Path | None, Path]:
    """The run, if it is one, and the checkpoint or weights."""
    folder = Path(name)
    if (folder / "run.json").exists():
        found = latest(folder / "checkpoints")
        if found is None:
            raise ConfigError(f"the run {name} has no whole checkpoint yet")
        return folder, found
    if folder.parent.name == "checkpoints" and (folder.parent.parent / "run.json").exists():
        if not folder.is_dir():
            raise ConfigError(
                f"there is no checkpoint {name}: the run has "
                f"{', '.join(sorted(p.name for p in folder.parent.glob('step-*')))}"
            )
        return folder.parent.parent, folder
    return None, find_weights(name)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def _trained_with(run: Path) -> DiTSettings:
    from datakit.config import load
    from trainer.training.setup import recorded

    recorded(run)
    return load(DiTSettings, run / "settings.yaml")


def _architecture(trained: DiTSettings) -> Architecture:
    """Without loading the run's text encoder for its sizes."""
    autoencoder = trained.autoencoder
    channels = describe_autoencoder(autoencoder.kind, weights_of(autoencoder), **autoencoder.sizes).channels
    return ARCHITECTURES.get(trained.model.architecture).of_settings(trained.model, Inputs(channels))


def _usual(run: Path) -> Usual | None:
    """The bucket of most windows; of videos, if there are any."""
    if not (run / "plan").exists():
        return None
    plan = Plan.open(run / "plan")
    bucket, windows = plan.commonest_bucket()
    fps = windows["fps"][0].as_py() if windows.num_rows else 0.0
    return Usual(bucket.frames, bucket.height, bucket.width, fps or FPS)
