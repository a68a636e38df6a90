"""The model that `--ckpt` names: a training run's folder, one of its checkpoints, or weights (a file, a folder of
shards, a name)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from datakit.errors import ConfigError
from datakit.weights.registry import weights_hash
from sampler.settings import ModelSettings, SampleSettings
from trainer.models.autoencoders.base import Autoencoder
from trainer.models.autoencoders.build import describe_autoencoder, weights_of
from trainer.models.autoencoders.settings import AutoencoderSettings
from trainer.models.common.lora import load_lora, merge_lora
from trainer.models.common.weights import find_weights, read_weights
from trainer.models.mmdit.checkpoint_io import config_of, load_mmdit, unwrapped
from trainer.models.mmdit.model import MMDiT, MMDiTConfig
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
        config: of the model; of a run's, sizes that follow from its text encoder are left at their defaults.
        usual: None without a run, or where its plan is gone.
    """

    name: str
    place: str
    run: str | None
    hash: str
    config: MMDiTConfig
    autoencoder: AutoencoderSettings
    text: TextSettings
    usual: Usual | None

    @property
    def patch(self) -> int:
        """Side of a token, in latents."""
        return self.config.patch_size

    @property
    def takes_condition(self) -> bool:
        """Whether references can be given to it."""
        return self.config.cond_embed

    def describe_autoencoder(self) -> Autoencoder:
        """Its sizes, without weights.

        Raises:
            ConfigError, MissingDependency: no weights are named, or not on this machine; not the autoencoder of this
                model.
        """
        own = self.autoencoder
        found = describe_autoencoder(own.kind, weights_of(own), **own.sizes)
        channels = self.config.in_channels // self.patch**2
        if found.channels != channels:
            raise ConfigError(
                f"{self.name} takes latents of {channels} channels, autoencoder {own.kind} has {found.channels}: "
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
        config = config_of(unwrapped(read_weights(place), name))
        autoencoder, text, usual = settings.autoencoder or AutoencoderSettings(), settings.text or TextSettings(), None
    else:
        trained = _trained_with(run)
        autoencoder, text, usual = (
            settings.autoencoder or trained.autoencoder,
            settings.text or trained.text,
            _usual(run),
        )
        config = _config(trained)
        digest += "" if settings.model.ema else " without ema"
    return Checkpoint(name, str(place), None if run is None else str(run), digest, config, autoencoder, text, usual)


def load_model(checkpoint: Checkpoint, settings: ModelSettings) -> MMDiT:
    """The model, on the CPU, without gradients; the dtype of its weights as they are stored.

    Raises:
        ConfigError, WeightsError: weights that do not fit.
    """
    if checkpoint.run is None:
        model = load_mmdit(checkpoint.place, allow_missing=("cond_in.*",), allow_unexpected=settings.allow_unexpected)
    else:
        from trainer.export.dit import run_weights

        found = run_weights(checkpoint.run, settings.ema, _step(Path(checkpoint.place)))
        with torch.device("meta"):
            model = MMDiT(found.config)
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


def _config(trained: DiTSettings) -> MMDiTConfig:
    own, kind = trained.model, trained.autoencoder
    channels = describe_autoencoder(kind.kind, weights_of(kind), **kind.sizes).channels
    return MMDiTConfig(
        in_channels=channels * own.patch_size**2,
        hidden_size=own.hidden_size,
        mlp_ratio=own.mlp_ratio,
        num_heads=own.num_heads,
        depth=own.depth,
        depth_single_blocks=own.depth_single_blocks,
        axes_dim=own.axes_dim,
        patch_size=own.patch_size,
    )


def _usual(run: Path) -> Usual | None:
    """The bucket of most windows; of videos, if there are any."""
    if not (run / "plan").exists():
        return None
    plan = Plan.open(run / "plan")
    bucket, windows = plan.commonest_bucket()
    fps = windows["fps"][0].as_py() if windows.num_rows else 0.0
    return Usual(bucket.frames, bucket.height, bucket.width, fps or FPS)
