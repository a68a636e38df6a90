"""The autoencoder's task: what a reconstruction is worth to the autoencoder, and to the discriminator that it is to
deceive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.data.dataloader import Batch
from trainer.evaluation.psnr_ssim import psnr, ssim
from trainer.models.autoencoders.base import Autoencoder, Encoded
from trainer.models.autoencoders.build import build_autoencoder
from trainer.models.autoencoders.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from trainer.models.autoencoders.lpips import Perceptual, build_perceptual
from trainer.vae.settings import TrainedAutoencoder, VAESettings

Model = Callable[..., tuple[Tensor, Encoded]]
"""An autoencoder, or what calls one (`Engine.forward`)."""


@dataclass(frozen=True)
class Draws:
    """All that is random about samples, from their seeds alone.

    Attributes:
        frames: [B, n] that the perceptual distance looks at, rising; None: all.
        noise: [B, c, T', H', W'] of the posterior.
    """

    frames: Tensor | None
    noise: Tensor


@dataclass(frozen=True)
class Sampled:
    """What came of a micro-batch; everything but `loss` without a graph.

    Attributes:
        loss: what the autoencoder is to lower.
        losses: [B] reconstruction losses.
        values: means over the batch, to log.
        video, reconstruction: [B, 3, T, H, W].
    """

    loss: Tensor
    losses: Tensor
    values: dict[str, Tensor]
    video: Tensor
    reconstruction: Tensor


class VAETask:
    """The task of training an autoencoder, on one device.

    Args:
        perceptual: moved to the device; None: none.
    """

    def __init__(
        self, settings: VAESettings, autoencoder: Autoencoder, perceptual: Perceptual | None, device: torch.device
    ):
        self.settings, self.autoencoder, self.device = settings, autoencoder, device
        self.perceptual = perceptual.to(device) if perceptual is not None else None
        self.last = last_layer(autoencoder)

    def sample(self, model: Model, batch: Batch, discriminator: PatchDiscriminator | None) -> Sampled:
        """Losses of a micro-batch.

        Args:
            discriminator: None: not yet, or none.
        """
        shape = self.autoencoder.latent_shape(batch.bucket.frames, batch.bucket.height, batch.bucket.width)
        options = self.settings.perceptual
        drawn = draw(batch.seeds, shape, batch.bucket.frames, options.frames if options else None)
        video = self.pixels(batch)
        made, encoded = model(video, drawn.noise.to(self.device))
        distances = (made.float() - video).abs().mean((1, 2, 3, 4))
        values = {"loss_l1": distances.mean()}
        if self.perceptual is not None and options.weight:
            seen = self.perceptual.of_videos(video, made, drawn.frames)
            values["loss_lpips"] = seen.mean()
            distances = distances + options.weight * seen
        loss = distances.mean()
        if discriminator is not None:
            fooled = generator_loss(discriminator.judge(made))
            weight = adaptive_weight(loss, fooled, self.last)
            values |= {"loss_gan": fooled, "gan_weight": weight}
            loss = loss + self.settings.gan.weight * weight * fooled
        if self.settings.kl and has_spread(encoded):
            values["loss_kl"] = divergence(encoded, self.autoencoder).mean() / video[0, :, 0].numel()
            loss = loss + self.settings.kl * values["loss_kl"]
        values["psnr"] = psnr(video, made.detach()).mean()
        return Sampled(
            loss, distances.detach(), {name: value.detach() for name, value in values.items()}, video, made.detach()
        )

    def judged(self, discriminate: Callable[[Tensor], Tensor], sampled: Sampled) -> Tensor:
        """The discriminator's loss on videos and what was made of them.

        Args:
            discriminate: a discriminator, or what calls one.
        """
        real, fake = discriminate(torch.cat((sampled.video, sampled.reconstruction.to(sampled.video)))).chunk(2)
        return discriminator_loss(real, fake)

    @torch.no_grad()
    def validate(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        """PSNR, SSIM and the perceptual distance of every sample, [B], from the mean and not from a sample of it."""
        video = self.pixels(batch)
        made = model(video)[0].float()
        found = {"psnr": psnr(video, made), "ssim": ssim(video, made)}
        return found | (
            {"lpips": self.perceptual.of_videos(video, made.clamp(-1, 1))} if self.perceptual is not None else {}
        )

    def pixels(self, batch: Batch) -> Tensor:
        """[B, 3, T, H, W] in −1..1, float32."""
        return batch.video.to(self.device).float() / 127.5 - 1


def build_trained(settings: TrainedAutoencoder, seed: int) -> Autoencoder:
    """The autoencoder to train, on the CPU, float32: from its weights or random ones.

    Raises:
        ConfigError, MissingDependency: see `build_autoencoder`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_autoencoder(settings.kind, settings.weights, **settings.sizes)
    if settings.recompute:
        model.checkpoint_activations()
    return model


def build_distance(settings: VAESettings) -> Perceptual | None:
    """Raises ConfigError, MissingDependency: see `build_perceptual`."""
    return (
        build_perceptual(settings.perceptual.kind, settings.perceptual.weights)
        if settings.perceptual is not None
        else None
    )


def build_discriminator(settings: VAESettings) -> PatchDiscriminator | None:
    if settings.gan is None:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return PatchDiscriminator(settings.gan.width, settings.gan.layers)


def draw(seeds: Sequence[int], shape: Sequence[int], frames: int, looked_at: int | None) -> Draws:
    """Draw on the CPU, whatever trains: generators of different devices give different numbers.

    Args:
        seeds: of the samples (`trainer.data.batch_sampler.MicroBatch.seeds`).
        shape: [c, T', H', W'] of a sample's latents.
        looked_at: frames by the perceptual distance, at most; None: all.
    """
    chosen, noise = [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        chosen.append(torch.randperm(frames, generator=generator)[:looked_at].sort().values)
        noise.append(torch.randn(tuple(shape), generator=generator))
    return Draws(torch.stack(chosen) if looked_at is not None and looked_at < frames else None, torch.stack(noise))


def has_spread(encoded: Encoded) -> bool:
    """Whether the autoencoder has one: those without have no graph to it."""
    return encoded.std.requires_grad


def divergence(encoded: Encoded, autoencoder: Autoencoder) -> Tensor:
    """Kullback-Leibler divergence [B] of the raw posterior from a standard normal, summed over a sample's latents:
    ½ Σ (μ² + σ² − 1 − ln σ²)."""
    mean = encoded.mean.float() / autoencoder.scale + autoencoder.shift
    std = encoded.std.float() / autoencoder.scale
    return 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).sum((1, 2, 3, 4))


def last_layer(autoencoder: Autoencoder) -> nn.Parameter:
    """The weight of the decoder's last convolution, that makes pixels."""
    return [p for p in autoencoder.decoder.parameters() if p.ndim > 1][-1]
