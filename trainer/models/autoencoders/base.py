"""The interface of a video autoencoder: videos to latents and back, whole or in tiles."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.models.autoencoders.tiling import Piece, Tiles, pieces, tiled
from trainer.planning.latent_grid import LatentGrid

LOG_VARIANCE = (-30.0, 20.0)
"""Where log variances end; latent diffusion's (CompVis/latent-diffusion, DiagonalGaussianDistribution), which
HunyuanVideo took over."""


class Encoded(NamedTuple):
    """The Gaussian that a video is encoded to; both [B, c, T', H', W'], scaled: (raw − shift) · scale.

    Attributes:
        std: zeros where the autoencoder has no spread.
    """

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Latents, from standard normal noise."""
        return self.mean + self.std * noise


class Autoencoder(nn.Module):
    """A video autoencoder. Videos are [B, 3, T, H, W] in −1..1, latents [B, c, T', H', W'], scaled.

    Each kind is a subclass in a module of `trainer.models.autoencoders.kinds`. It declares the class attributes and
    brings two networks: `moments` (video to raw mean and, with a spread, raw log variance, in channels), most of which
    is the module `encoder`, and `pixels` (raw latents to video), most of which is `decoder`.

    Attributes:
        kind: its name in settings and in files; that of the module, with `-` for `_`.
        config_class: of `config`, a frozen dataclass; its fields are the `sizes` of `build_autoencoder`.
        tiles: what the authors use where memory is short.
        blocks: names of the classes whose activations `checkpoint_activations` computes again.
        embedded: file of the weights that come with datakit, if any do.
        channels: of latents.
        grid: the sizes of videos that it takes.
        scale, shift: latents are (raw − shift) · scale.
    """

    kind: ClassVar[str]
    config_class: ClassVar[type]
    tiles: ClassVar[Tiles]
    blocks: ClassVar[frozenset[str]]
    embedded: ClassVar[Path | None] = None

    def __init__(
        self, config: Any, channels: int, compression: tuple[int, int, int], scale: float, shift: float, causal: bool
    ):
        super().__init__()
        self.config, self.channels, self.grid = config, channels, LatentGrid(compression, causal)
        self.scale, self.shift = scale, shift

    @property
    def compression(self) -> tuple[int, int, int]:
        """In time, height and width."""
        return self.grid.compression

    @property
    def causal(self) -> bool:
        """Whether the first frame has a latent of its own, see `LatentGrid`."""
        return self.grid.causal

    def moments(self, video: Tensor) -> Tensor:
        raise NotImplementedError

    def pixels(self, latents: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, video: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Encoded]:
        """The video again, from the mean or, with noise, from a sample; and what it was encoded to. For training: what
        wraps a module (DDP, ZeRO) sees this call only."""
        encoded = self.encode(video)
        return self.decode(encoded.mean if noise is None else encoded.sample(noise)), encoded

    def encode(self, video: Tensor, tiles: Tiles | None = None) -> Encoded:
        """Latents of videos; with tiles, in memory bounded by one tile and the result.

        Raises:
            ValueError: sizes that do not fit, see `latent_shape`; tiles too small.
        """
        _, *latent = self.latent_shape(*video.shape[2:])
        raw = tiled(self.moments, video, self._axes(latent, tiles, encoding=True)) if tiles else self.moments(video)
        mean = (raw[:, : self.channels] - self.shift) * self.scale
        spread = raw[:, self.channels :]
        std = (0.5 * spread.clamp(*LOG_VARIANCE)).exp() * self.scale if spread.shape[1] else torch.zeros_like(mean)
        return Encoded(mean, std)

    def decode(self, latents: Tensor, tiles: Tiles | None = None) -> Tensor:
        """Videos of latents. Values may leave −1..1 a little."""
        raw = latents / self.scale + self.shift
        return (
            tiled(self.pixels, raw, self._axes(latents.shape[2:], tiles, encoding=False)) if tiles else self.pixels(raw)
        )

    def rescale(self, mean: float, std: float) -> None:
        """Change shift and scale so that latents that had these moments get mean 0 and standard deviation 1. Weights
        stay."""
        self.shift, self.scale = self.shift + mean / self.scale, 1 / (std / self.scale)
        self.config = dataclasses.replace(self.config, shift=self.shift, scale=self.scale)

    def checkpoint_activations(self) -> int:
        """From now on the backward pass computes what is inside of blocks again; how many there are. Names and values
        of weights stay."""
        blocks = [module for module in self.modules() if type(module).__name__ in self.blocks]
        for module in blocks:
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)
        return len(blocks)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """[c, T', H', W'] of a video's latents.

        Raises:
            ValueError: sizes that do not fit; the message has the nearest that do.
        """
        latent = self.grid.nearest(frames, height, width)
        fits = self.grid.size_of(latent)
        if fits != (frames, height, width):
            _, h, w = self.compression
            raise ValueError(
                f"{self.kind} takes {self.grid.rule}, height in multiples of {h} and width of {w}, not {frames} of "
                f"{height}×{width}; "
                f"the nearest is {fits[0]} of {fits[1]}×{fits[2]}"
            )
        return self.channels, *latent

    def frames_of(self, latent_frames: int) -> int:
        """Frames that so many latent frames decode to."""
        return self.grid.frames_of(latent_frames)

    def _axes(self, latent: list[int] | torch.Size, tiles: Tiles, encoding: bool) -> list[list[Piece]]:
        sizes = [size // by for size, by in zip((tiles.frames, tiles.height, tiles.width), self.compression)]
        least = (1 if self.causal else 2, 1, 1)  # a lone latent frame is an image
        if any(size < few for size, few in zip(sizes, least)):
            t, h, w = (few * by for few, by in zip(least, self.compression))
            raise ValueError(
                f"{self.kind} needs tiles of at least {t} frames of {h}×{w}, not {tiles.frames} of "
                f"{tiles.height}×{tiles.width}"
            )
        return [
            pieces(length, size, tiles.overlap, (by, 1) if encoding else (1, by), lead)
            for length, size, by, lead in zip(latent, sizes, self.compression, (int(self.causal), 0, 0))
        ]


def pixels(video: torch.Tensor, model: torch.nn.Module) -> torch.Tensor:
    """What an autoencoder is given: −1 to 1, in the number format of its weights.

    Args:
        video: uint8 full-range RGB, any shape.
    """
    return (video.float() / 127.5 - 1).to(next(model.parameters()).dtype)
