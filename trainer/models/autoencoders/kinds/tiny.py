"""A small causal 3D autoencoder for CPUs: it does what the large ones do, at HunyuanVideo's compression, with 0.34 M
parameters.

Three stages of residual convolutions, the first on patches of 4 × 4 pixels; sizes change by moving pixels into channels
and back, under a linear layer. Convolutions repeat the border; in time they look back only, and repeat the first frame.
Norms are over channels alone. So results depend on a neighbourhood: a latent on 4 pixels around its own 8 × 8, a pixel
on latents that begin within 12 pixels, both on at most 14 frames before.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datakit.errors import ConfigError
from trainer.models.autoencoders.base import Autoencoder
from trainer.models.autoencoders.tiling import Tiles

NORM_EPS = 1e-6
LOG_VARIANCE = -6.0
"""Where log variances start: a spread of 0.05, so that noise does not drown the first steps of training."""
FACTORS = ((1, 4, 4), (2, 2, 2), (2, 1, 1))
"""What each stage compresses first: time, height, width."""
SIDES = (3, 1, 1)
"""Of its convolutions in space."""


@dataclass(frozen=True)
class TinyConfig:
    """Sizes.

    Attributes:
        widths: channels of the stages, outermost first.
        depth: residual blocks of each stage.
        scale, shift: latents are (raw − shift) · scale.
    """

    latent_channels: int = 16
    widths: tuple[int, int, int] = (48, 96, 96)
    depth: int = 1
    scale: float = 1.0
    shift: float = 0.0

    def __post_init__(self) -> None:
        if len(self.widths) != len(FACTORS):
            raise ConfigError(f"the autoencoder tiny has {len(FACTORS)} widths, not {len(self.widths)}")


class TinyAE(Autoencoder):
    """4 × in time, 8 × in space, with a Gaussian posterior."""

    kind = "tiny"
    config_class = TinyConfig
    tiles = Tiles(32, 128, 128)
    blocks = frozenset({"Block"})
    embedded = Path(__file__).parent / "weights_tiny" / "tiny_ae.safetensors"

    def __init__(self, config: TinyConfig = TinyConfig()):
        super().__init__(config, config.latent_channels, (4, 8, 8), config.scale, config.shift, causal=True)
        self.encoder, self.decoder = _encoder(config), _decoder(config)

    def moments(self, video: Tensor) -> Tensor:
        return self.encoder(video)

    def pixels(self, latents: Tensor) -> Tensor:
        return self.decoder(latents)


def _encoder(config: TinyConfig) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for factors, side, width in zip(FACTORS, SIDES, config.widths):
        layers += [Down(channels, width, factors), *(Block(width, side) for _ in range(config.depth))]
        channels = width
    out = nn.Conv3d(channels, 2 * config.latent_channels, 1)
    with torch.no_grad():
        out.bias[config.latent_channels :] = LOG_VARIANCE
    return nn.Sequential(*layers, Norm(channels), nn.SiLU(), out)


def _decoder(config: TinyConfig) -> nn.Sequential:
    layers: list[nn.Module] = [CausalConv(config.latent_channels, config.widths[-1], (1, 3, 3))]
    for factors, side, width, out in reversed(list(zip(FACTORS, SIDES, config.widths, (3, *config.widths)))):
        layers += [*(Block(width, side) for _ in range(config.depth)), Up(width, out, factors)]
    return nn.Sequential(*layers)


class Block(nn.Module):
    """A convolution in space, then one in time."""

    def __init__(self, width: int, side: int):
        super().__init__()
        self.norm, self.space, self.time = (
            Norm(width),
            CausalConv(width, width, (1, side, side)),
            CausalConv(width, width, (3, 1, 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.time(F.silu(self.space(F.silu(self.norm(x)))))


class CausalConv(nn.Conv3d):
    """Of the size of its input; each frame depends on itself and earlier ones."""

    def __init__(self, channels: int, out: int, kernel: tuple[int, int, int]):
        super().__init__(channels, out, kernel)
        time, height, width = kernel
        self.border = (width // 2, width // 2, height // 2, height // 2, time - 1, 0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, self.border, mode="replicate") if any(self.border) else x)


class Norm(nn.Module):
    """Root mean square over channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + NORM_EPS) * self.weight.view(-1, 1, 1, 1)


class Down(nn.Module):
    """Pixels into channels. Where time halves, the first frame goes in twice: 2n − 1 frames make n."""

    def __init__(self, channels: int, out: int, factors: tuple[int, int, int]):
        super().__init__()
        self.factors = factors
        self.linear = nn.Conv3d(channels * factors[0] * factors[1] * factors[2], out, 1)

    def forward(self, x: Tensor) -> Tensor:
        (a, b, c), (n, channels, _, h, w) = self.factors, x.shape
        if a == 2:
            x = torch.cat((x[:, :, :1], x), 2)
        x = x.view(n, channels, -1, a, h // b, b, w // c, c).permute(0, 1, 3, 5, 7, 2, 4, 6)
        return self.linear(x.reshape(n, channels * a * b * c, -1, h // b, w // c))


class Up(nn.Module):
    """Channels into pixels. Where time doubles, the frame before the first is dropped: n frames make 2n − 1."""

    def __init__(self, channels: int, out: int, factors: tuple[int, int, int]):
        super().__init__()
        self.factors = factors
        self.linear = nn.Conv3d(channels, out * factors[0] * factors[1] * factors[2], 1)

    def forward(self, x: Tensor) -> Tensor:
        (a, b, c), (n, _, t, h, w) = self.factors, x.shape
        x = self.linear(x).view(n, -1, a, b, c, t, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
        x = x.reshape(n, -1, t * a, h * b, w * c)
        return x[:, :, 1:] if a == 2 else x
