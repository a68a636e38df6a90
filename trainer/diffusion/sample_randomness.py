"""Everything that is random about one sample of DiT training, from its seed alone: the same on any number of processes,
in any batch, and after a resume."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.diffusion.conditioning import choose


@dataclass(frozen=True)
class Draws:
    """Of the samples of a micro-batch.

    Attributes:
        normal: [B], standard normal: gives the time (`trainer.diffusion.rectified_flow.training_time`).
        modes: of `trainer.diffusion.conditioning.MODES`, one a sample.
        no_states, no_pooled: [B] bool: the empty prompt's instead, drawn apart.
        spread: as the latents: noise of the autoencoder's posterior.
        noise: as the latents: noise at time 1.
    """

    normal: Tensor
    modes: tuple[str, ...]
    no_states: Tensor
    no_pooled: Tensor
    spread: Tensor
    noise: Tensor


def draw(seeds: Sequence[int], shape: Sequence[int], frames: int, modes: Mapping[str, float], dropout: float) -> Draws:
    """Draw on the CPU, whatever trains: generators of different devices give different numbers.

    Args:
        seeds: of the samples (`trainer.data.batch_sampler.MicroBatch.seeds`).
        shape: [c, T, H, W] of a sample's latents.
        frames: of its video.
        modes: weights of the condition modes; those that do not fit `frames` are left out.
        dropout: probability that a sample's states, and that its pooled text, are those of the empty prompt.
    """
    drawn = [_draw_one(seed, shape) for seed in seeds]
    normal, uniform, spread, noise = (torch.stack(parts) for parts in zip(*drawn))
    return Draws(
        normal,
        tuple(choose(modes, frames, u) for u in uniform[:, 0].tolist()),
        uniform[:, 1] < dropout,
        uniform[:, 2] < dropout,
        spread,
        noise,
    )


def _draw_one(seed: int, shape: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Time, three uniform numbers, and noise last, so that another shape changes nothing before it."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn((), generator=generator)
    uniform = torch.rand(3, generator=generator)
    return (
        normal,
        uniform,
        torch.randn(tuple(shape), generator=generator),
        torch.randn(tuple(shape), generator=generator),
    )
