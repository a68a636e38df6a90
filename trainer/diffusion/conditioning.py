"""What a model is given of a video: nothing (text to video), its first or last frame, or a stretch of it (Open-Sora
2.0's modes)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.diffusion.rectified_flow import condition

if TYPE_CHECKING:
    from trainer.models.autoencoders.base import Autoencoder
    from trainer.models.autoencoders.tiling import Tiles

LONG, EASY = 33, 65
"""Frames that a video to be continued gives (arXiv:2503.09642; its code)."""


@dataclass(frozen=True)
class Given:
    """Frames given at the start and at the end of a video."""

    head: int = 0
    tail: int = 0


MODES: dict[str, Given] = {
    "t2v": Given(),
    "i2v_head": Given(head=1),
    "i2v_tail": Given(tail=1),
    "i2v_loop": Given(1, 1),
    "v2v_head": Given(head=LONG),
    "v2v_tail": Given(tail=LONG),
    "v2v_head_easy": Given(head=EASY),
    "v2v_tail_easy": Given(tail=EASY),
}


def fitting(weights: Mapping[str, float], frames: int) -> dict[str, float]:
    """The modes, with their weights, that leave a video of so many frames something to make. Images are made from text
    alone.

    Raises:
        KeyError: there is no such mode.
    """
    left = {
        mode: weight for mode, weight in weights.items() if weight > 0 and MODES[mode].head + MODES[mode].tail < frames
    }
    return left or {"t2v": 1.0}


def choose(weights: Mapping[str, float], frames: int, uniform: float) -> str:
    """A mode by weight.

    Args:
        uniform: number drawn from 0..1.
    """
    modes = fitting(weights, frames)
    rest = uniform * sum(modes.values())
    for mode, weight in modes.items():
        rest -= weight
        if rest < 0:
            return mode
    return next(reversed(modes))  # rounding: `uniform` was next to 1


def latent_frames(given: Given, autoencoder: Autoencoder) -> Given:
    """Latent frames that hold the given frames."""
    return Given(*(autoencoder.grid.latent_frames(n, ceil) if n else 0 for n in (given.head, given.tail)))


def given_condition(
    video: Tensor, given: Given, autoencoder: Autoencoder, latents: Tensor | None = None, tiles: Tiles | None = None
) -> Tensor:
    """The condition of one mode, for a batch of videos.

    The frames at the end are encoded by themselves, so that their latents know nothing of the frames before, that
    sampling does not have. At the start a causal autoencoder makes no difference between the two, and `latents` serve.

    Args:
        video: [B, 3, T, H, W] in −1..1: all of it, or at least the given frames at either end.
        latents: [B, c, T', H', W'] means of the whole video, where it has been encoded already; only their shape is
            used at the end, and for autoencoders that are not causal.

    Returns:
        [B, c + 1, T', H', W'], see `trainer.diffusion.rectified_flow.condition`.
    """
    shape = latents.shape if latents is not None else (video.shape[0], *autoencoder.latent_shape(*video.shape[2:]))
    reference = torch.zeros(shape, dtype=video.dtype if latents is None else latents.dtype, device=video.device)
    mask = torch.zeros(shape[0], 1, *shape[2:], dtype=reference.dtype, device=video.device)
    at = latent_frames(given, autoencoder)
    if given.head:
        reference[:, :, : at.head] = (
            latents[:, :, : at.head]
            if latents is not None and autoencoder.causal
            else _encoded(video[:, :, : given.head], autoencoder, tiles)
        )
        mask[:, :, : at.head] = 1
    if given.tail:
        reference[:, :, -at.tail :] = _encoded(video[:, :, -given.tail :], autoencoder, tiles)
        mask[:, :, -at.tail :] = 1
    return condition(mask, reference)


def _encoded(frames: Tensor, autoencoder: Autoencoder, tiles: Tiles | None) -> Tensor:
    """Means of frames by themselves; the last frame is repeated until their number is one that the autoencoder
    takes."""
    grid = autoencoder.grid
    padded = grid.frames_of(grid.latent_frames(frames.shape[2], ceil))
    frames = torch.cat((frames, frames[:, :, -1:].expand(-1, -1, padded - frames.shape[2], -1, -1)), 2)
    return autoencoder.encode(frames, tiles).mean
