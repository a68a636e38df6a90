"""From a run of `datakit train vae` to weights that everything else loads: one file that knows its sizes and its
scale."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from datakit.config import load
from datakit.errors import ConfigError
from trainer.evaluation.vae import latent_moments
from trainer.export.checkpoint_reader import EMA, checkpoint_of, open_shards, read_whole, step_of
from trainer.models.autoencoders.base import Autoencoder
from trainer.models.autoencoders.build import CONFIG_KEY, described
from trainer.models.common.weights import cast, save_weights
from trainer.planning.plan import Plan
from trainer.vae.settings import VAESettings
from trainer.vae.task import build_trained

MEASURED = 256
"""Windows of the run's plan whose latents the scale is measured on."""


def export_autoencoder(
    run: Path,
    out: Path,
    ema: bool = True,
    rescale: bool = False,
    dtype: torch.dtype = torch.float32,
    about: Mapping[str, str] | None = None,
    step: int | None = None,
) -> Autoencoder:
    """Write a checkpoint's autoencoder as one safetensors file, which `build_autoencoder` loads with its sizes.

    Args:
        run: its folder.
        ema: the average of the weights, not the weights.
        rescale: set shift and scale so that latents of the run's windows have mean 0 and standard deviation 1.
        about: more for the file's metadata (footage, licence …).
        step: of the checkpoint; None: the newest.

    Returns:
        the autoencoder as written, float32.

    Raises:
        ConfigError: no run or checkpoint there, damage, no EMA.
    """
    checkpoint = checkpoint_of(run, step)
    settings = load(VAESettings, run / "settings.yaml")
    model = trained(settings, checkpoint, ema)
    if rescale:
        moments = latent_moments(Plan.open(run / "plan"), model, MEASURED)
        model.rescale(moments.mean, moments.std)
    state = {name: cast(tensor, dtype) for name, tensor in model.state_dict().items()}
    save_weights(state, out, {CONFIG_KEY: described(model), "step": str(step_of(checkpoint)), **(about or {})})
    return model


@torch.no_grad()
def trained(settings: VAESettings, checkpoint: Path, ema: bool) -> Autoencoder:
    """The autoencoder of a checkpoint, which any number of ranks wrote, on the CPU, float32.

    Raises:
        ConfigError: damage, another model, no EMA.
    """
    shards = open_shards(checkpoint / "autoencoder")
    start = settings.autoencoder.model_copy(update={"recompute": False})
    model = build_trained(start, settings.seed).eval().requires_grad_(False)
    parameters = dict(model.named_parameters())
    shards.check_model({name: tuple(p.shape) for name, p in parameters.items()})
    if ema and not shards.has(EMA):
        raise ConfigError(
            f"{checkpoint} has no EMA to export: its run had engine.ema=null; export the weights themselves"
        )
    for name, parameter in parameters.items():
        parameter.copy_(read_whole(shards, name, ema))
    for name, buffer in model.named_buffers():
        buffer.copy_(shards.buffer(name))
    return model
