"""From a run of `datakit train vae` to weights that everything else loads: one file that knows its sizes and its scale."""

from __future__ import annotations

import dataclasses
from math import prod
from pathlib import Path
from typing import Mapping

import torch
from torch import Tensor

from datakit.config import load
from datakit.errors import ConfigError
from trainer.checkpoint import latest
from trainer.engine.shards import Piece, Shards, check_shard, find_shards
from trainer.evaluate_vae import Moments, latent_moments
from trainer.models.autoencoder import CONFIG_KEY, Autoencoder, described
from trainer.models.weights import save_weights
from trainer.plan import Plan
from trainer.training import recorded
from trainer.vae import build_trained
from trainer.vae_settings import VAESettings

MEASURED = 256
"""Windows of the run's plan whose latents the scale is measured on."""


def export_autoencoder(
    run: Path, out: Path, ema: bool = True, rescale: bool = False, dtype: torch.dtype = torch.float32,
    about: Mapping[str, str] | None = None,
) -> Autoencoder:
    """Write the newest checkpoint's autoencoder as one safetensors file, which `build_autoencoder` loads with its sizes.

    Args:
        run: its folder.
        ema: the average of the weights, not the weights.
        rescale: set shift and scale so that latents of the run's windows have mean 0 and standard deviation 1.
        about: more for the file's metadata (footage, licence …).

    Returns:
        the autoencoder as written, float32.

    Raises:
        ConfigError: no run or checkpoint there, damage, no EMA.
    """
    recorded(run)
    checkpoint = latest(run / "checkpoints")
    if checkpoint is None:
        raise ConfigError(f"{run} has no whole checkpoint to export")
    settings = load(VAESettings, run / "settings.yaml")
    model = trained(settings, checkpoint, ema)
    if rescale:
        set_scale(model, latent_moments(Plan.open(run / "plan"), model, MEASURED))
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    save_weights(state, out, {CONFIG_KEY: described(model), "step": checkpoint.name.removeprefix("step-"), **(about or {})})
    return model


@torch.no_grad()
def trained(settings: VAESettings, checkpoint: Path, ema: bool) -> Autoencoder:
    """The autoencoder of a checkpoint, which any number of ranks wrote, on the CPU, float32.

    Raises:
        ConfigError: damage, another model, no EMA.
    """
    folder = checkpoint / "autoencoder"
    for file in find_shards(folder):
        check_shard(file)
    shards = Shards(folder)
    start = settings.autoencoder.model_copy(update={"recompute": False})
    model = build_trained(start, settings.seed).eval().requires_grad_(False)
    parameters = dict(model.named_parameters())
    shards.check_model({name: tuple(p.shape) for name, p in parameters.items()})
    if ema and not shards.has("ema"):
        raise ConfigError(f"{checkpoint} has no EMA to export: its run had engine.ema=null; export the weights themselves")
    for name, parameter in parameters.items():
        parameter.copy_(_whole(shards, "ema" if ema else "master", name, parameter))
    for name, buffer in model.named_buffers():
        buffer.copy_(shards.buffer(name))
    return model


def set_scale(model: Autoencoder, found: Moments) -> None:
    """Change shift and scale so that latents that had these moments get mean 0 and standard deviation 1; a DC-AE, which has no
    shift, the deviation alone. Weights stay."""
    mean, std = model.shift + found.mean / model.scale, found.std / model.scale
    if "scaling" in {field.name for field in dataclasses.fields(model.config)}:
        model.config, model.scale = dataclasses.replace(model.config, scaling=std), 1 / std
        return
    model.config, model.shift, model.scale = dataclasses.replace(model.config, shift=mean, scale=1 / std), mean, 1 / std


def _whole(shards: Shards, kind: str, name: str, parameter: Tensor) -> Tensor:
    size = prod(parameter.shape)
    piece = Piece(name, tuple(parameter.shape), None, 0, size, (0, size), dict)
    return shards.read(kind, piece, 0, size).view(parameter.shape)
