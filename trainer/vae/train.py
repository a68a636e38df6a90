"""`datakit train vae`: the autoencoder's task under the engine and the loop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from trainer.data.dataloader import Batch
from trainer.engine import Engine
from trainer.models.autoencoders.base import Autoencoder
from trainer.models.autoencoders.build import check_precision
from trainer.planning.settings import PlanSettings
from trainer.training.collectives import share_out
from trainer.training.evaluation import first_batches
from trainer.training.loop import Ended, train
from trainer.training.preview import write_video
from trainer.training.setup import Prepared, Request, fit_to, prepare
from trainer.training.task import Learned
from trainer.vae.settings import VAESettings
from trainer.vae.task import VAETask, build_discriminator, build_distance, build_trained

PATCH, TEXT_TOKENS = 1, 0
"""Tokens of a plan for an autoencoder are latent positions."""


def train_vae(request: Request, settings: VAESettings) -> Ended:
    """Train on every process that takes part; each calls this.

    Raises:
        ConfigError, CatalogError, MissingDependency: what keeps it from starting, before any model is moved or file
            written.
        NotFinite, DatakitError: see `trainer.training.loop.Loop.run`.
    """
    check_precision(settings.engine.precision, "cuda" if torch.cuda.is_available() else "cpu")
    autoencoder, perceptual = build_trained(settings.autoencoder, settings.seed), build_distance(settings)
    discriminator = build_discriminator(settings)
    prepared = prepare(request, settings, fitted(autoencoder), "train vae")
    task = VAETask(settings, autoencoder.to(prepared.device), perceptual, prepared.device)
    engines = {"autoencoder": Engine(autoencoder, settings.engine, settings.optimizer, prepared.device)}
    if discriminator is not None:
        plain = settings.engine.model_copy(update={"ema": None})
        engines["discriminator"] = Engine(
            discriminator.to(prepared.device), plain, settings.gan.optimizer, prepared.device
        )
    return train(prepared, VAETraining(prepared, task, engines))


def fitted(autoencoder: Autoencoder):
    """Plan settings that fit: no captions are needed, tokens are latent positions."""
    fit = fit_to(autoencoder, PATCH, TEXT_TOKENS)

    def change(plan: PlanSettings) -> PlanSettings:
        return fit(plan).model_copy(update={"captions": "optional"})

    return change


class VAETraining:
    """An autoencoder under an engine, and the discriminator that it is to deceive under another, see
    `trainer.training.task.Task`.

    A step's gradients are those of all its micro-batches, for both networks: the discriminator judges reconstructions
    as they were when the autoencoder was judged by it, and both are updated at the end.

    Args:
        engines: `autoencoder`, and `discriminator` if there is to be one.
    """

    def __init__(self, prepared: Prepared, task: VAETask, engines: Mapping[str, Engine]):
        self.prepared, self.task, self.engines, self.settings = prepared, task, engines, task.settings
        self.engine = engines["autoencoder"]

    def learn(self, step: int, batch: Batch, last: bool) -> Learned:
        opponent = self._opponent(step)
        sampled = self.task.sample(self.engine.forward, batch, opponent.module if opponent else None)
        self.engine.backward(sampled.loss * batch.weight, last)
        values = sampled.values
        if opponent:
            judged = self.task.judged(opponent.forward, sampled)
            opponent.backward(judged * batch.weight, last)
            values = values | {"loss_discriminator": judged.detach()}
        return Learned(sampled.losses, values)

    def update(self, step: int) -> float:
        """The norm of the autoencoder's gradient, or the first that is not finite."""
        norms = [engine.step() for engine in (self.engine, self._opponent(step)) if engine is not None]
        return next((norm for norm in norms if not math.isfinite(norm)), norms[0])

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        return self.task.validate(self.engine.forward, batch)

    @torch.no_grad()
    def preview(self, folder: Path) -> None:
        """Originals, and reconstructions on their right. Each rank makes some, and all as many."""
        plan, count = self.prepared.val or self.prepared.plan, self.settings.preview.count
        # every rank reads the same, and makes its share
        batches = first_batches(plan, count, self.settings.loader, 0, 1)
        rows = [(batch, row) for batch in batches for row in range(len(batch.windows))]
        shown = [*enumerate(rows[:count])]
        for number, (batch, row) in share_out(shown, self.engine.rank, self.engine.world):
            video = self.task.pixels(batch)[row : row + 1]
            pair = torch.cat((video, self.engine.forward(video)[0].float()), -1)
            write_video(pair[0], folder / f"{number:02d}-{batch.clip_ids[row]}.mp4", batch.fps[row])

    def _opponent(self, step: int) -> Engine | None:
        """The discriminator, from the step on that it takes part in."""
        gan = self.settings.gan
        return self.engines.get("discriminator") if gan is not None and step >= gan.start else None
