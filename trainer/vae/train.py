"""`datakit train vae`: the autoencoder's task under the engine and the loop."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.data.batch_sampler import Order
from trainer.data.dataloader import Batch, Loader, Position
from trainer.engine import Engine
from trainer.models.autoencoders.base import Autoencoder
from trainer.models.autoencoders.build import check_precision
from trainer.planning.plan import Plan
from trainer.planning.settings import PlanSettings
from trainer.training.loop import Ended, Stepped
from trainer.training.preview import write_video
from trainer.training.setup import Prepared, Request, fit_to, prepare, share_out, train
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
    return train(prepared, VAEJob(prepared, task, engines))


def fitted(autoencoder: Autoencoder):
    """Plan settings that fit: no captions are needed, tokens are latent positions."""
    fit = fit_to(autoencoder, PATCH, TEXT_TOKENS)

    def change(plan: PlanSettings) -> PlanSettings:
        return fit(plan).model_copy(update={"captions": "optional"})

    return change


class VAEJob:
    """See `trainer.training.loop.Job`.

    A step's gradients are those of all its micro-batches, for both networks: the discriminator judges reconstructions
    as they were when the autoencoder was judged by it, and both are updated at the end.

    Args:
        engines: `autoencoder`, and `discriminator` if there is to be one.
    """

    def __init__(self, prepared: Prepared, task: VAETask, engines: Mapping[str, Engine]):
        self.prepared, self.task, self.engines = prepared, task, engines
        self.engine, self.opponent = engines["autoencoder"], engines.get("discriminator")
        self.settings: VAESettings = prepared.settings

    def step(self, index: int, batches: list[Batch]) -> Stepped:
        opponent = self.opponent if self.opponent is not None and index >= self.settings.gan.start else None
        means: dict[str, Tensor] = {}
        losses, clips = [], []
        for i, batch in enumerate(batches):
            last = i + 1 == len(batches)
            sampled = self.task.sample(self.engine.forward, batch, opponent.module if opponent else None)
            self.engine.backward(sampled.loss * batch.weight, last)
            values = sampled.values
            if opponent:
                judged = self.task.judged(opponent.forward, sampled)
                opponent.backward(judged * batch.weight, last)
                values = values | {"loss_discriminator": judged.detach()}
            for name, value in values.items():
                means[name] = means.get(name, 0) + value * batch.weight
            if batch.weight:
                losses.append(sampled.losses)
                clips += batch.clip_ids
        norms = [engine.step() for engine in (self.engine, opponent) if engine is not None]
        worst = next((norm for norm in norms if not math.isfinite(norm)), norms[0])
        tokens = sum(b.bucket.tokens * len(b.clip_ids) for b in batches if b.weight)
        return Stepped(means, torch.cat(losses) if losses else torch.zeros(0), clips, worst, tokens)

    def validate(self) -> dict[str, float]:
        """Means over clips of the val split."""
        if self.prepared.val is None:
            return {}
        sums: dict[str, Tensor] = {}
        count = 0
        for batch in self._batches(self.prepared.val, self.settings.validation.windows):
            found = self.task.validate(self.engine.forward, batch)
            for name, value in found.items():
                sums[name] = sums.get(name, 0) + value.sum().cpu().double() * bool(batch.weight)
            count += len(batch.windows) * bool(batch.weight)
        everything = torch.stack([*sums.values(), torch.tensor(count, dtype=torch.float64)])
        dist.all_reduce(everything)
        return {f"val_{name}": float(value / everything[-1]) for name, value in zip(sums, everything)}

    @torch.no_grad()
    def preview(self, folder: Path) -> None:
        """Originals, and reconstructions on their right. Each rank makes some, and all as many."""
        plan = self.prepared.val or self.prepared.plan
        options = self.settings.loader.model_copy(update={"augment": "none", "flip": False, "workers": 0})
        order = Order(plan, 0)
        made = []
        with Loader(
            plan, order, 0, 1, Position(0, 0), options
        ) as loader:  # every rank reads the same, and makes its share
            for _, batches in islice(loader, order.steps(0)):
                made += [(batch, row) for batch in batches for row in range(len(batch.windows))]
                if len(made) >= self.settings.preview.count:
                    break
        shown = [*enumerate(made[: self.settings.preview.count])]
        for number, (batch, row) in share_out(shown, self.engine.rank, self.engine.world):
            video = self.task.pixels(batch)[row : row + 1]
            pair = torch.cat((video, self.engine.forward(video)[0].float()), -1)
            write_video(pair[0], folder / f"{number:02d}-{batch.clip_ids[row]}.mp4", batch.fps[row])

    def _batches(self, plan: Plan, windows: int) -> Iterator[Batch]:
        """This rank's micro-batches of the first steps that hold so many windows; every rank has as many."""
        order, seen = Order(plan, 0), 0
        options = self.settings.loader.model_copy(update={"augment": "none", "flip": False, "workers": 0})
        with Loader(plan, order, self.engine.rank, self.engine.world, Position(0, 0), options) as loader:
            for index in range(order.steps(0)):
                if seen >= windows:
                    return
                yield from next(loader)[1]
                seen += sum(len(b.windows) for b in order.step(0, index))
