"""Video DC-AE, the high-compression autoencoder of Open-Sora 2.0 (after arXiv:2410.10733): 4 × in time, 32 × in space.
Convolutions with residual blocks outside, multi-scale linear attention (EfficientViT, arXiv:2205.14756) inside; every
change of size has a shortcut without weights. Not causal. Its parameters have the released checkpoint's names and
shapes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datakit.errors import ConfigError
from trainer.models.autoencoders.base import Autoencoder
from trainer.models.autoencoders.tiling import Tiles

HEAD = 32
SCALE = 5
EXPANSION = 4
NORM_EPS = 1e-5
ATTENTION_EPS = 1e-15


@dataclass(frozen=True)
class DCAEConfig:
    """Sizes; the defaults are those of the released model (459.5 M parameters).

    Attributes:
        attention: of each stage, outermost first, whether it attends (else: residual convolutions).
        halves_time: after each stage but the last, whether time is halved with space.
        scaling: what latents are divided by before a model sees them.
    """

    latent_channels: int = 128
    widths: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    encoder_depths: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    decoder_depths: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    attention: tuple[bool, ...] = (False, False, False, True, True, True)
    halves_time: tuple[bool, ...] = (False, False, False, True, True, False)
    scaling: float = 0.493

    def __post_init__(self) -> None:
        for name in ("encoder_depths", "decoder_depths", "attention", "halves_time"):
            if len(getattr(self, name)) != len(self.widths):
                raise ConfigError(
                    f"the autoencoder dc-ae has {len(self.widths)} widths, but {len(getattr(self, name))} {name}"
                )

    @property
    def space(self) -> int:
        """Compression of height and width."""
        return 2 ** (len(self.widths) - 1)

    @property
    def time(self) -> int:
        """Compression of time."""
        return 2 ** sum(self.halves_time[:-1])


class DCAE(Autoencoder):
    """Videos to latents and back. There is no spread: an autoencoder, not a VAE.

    An image is a video of one frame, with one latent frame: as in the reference, nothing happens to its time. So one
    latent frame decodes to one frame, and videos begin at 8 frames.
    """

    kind = "dc-ae"
    config_class = DCAEConfig
    tiles = Tiles(32, 256, 256)
    blocks = frozenset({"ResBlock", "AttentionBlock"})

    def __init__(self, config: DCAEConfig = DCAEConfig()):
        super().__init__(
            config,
            config.latent_channels,
            (config.time, config.space, config.space),
            1 / config.scaling,
            0.0,
            causal=False,
        )
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    def moments(self, video: Tensor) -> Tensor:
        return self.encoder(video)

    def pixels(self, latents: Tensor) -> Tensor:
        return self.decoder(latents)

    def rescale(self, mean: float, std: float) -> None:
        """The deviation alone: there is no shift."""
        self.config = replace(self.config, scaling=std / self.scale)
        self.scale = 1 / self.config.scaling


class Encoder(nn.Module):
    def __init__(self, config: DCAEConfig):
        super().__init__()
        widths = config.widths
        self.project_in = Conv(3, widths[0], 3)
        self.stages = nn.ModuleList()
        for i, (width, depth) in enumerate(zip(widths, config.encoder_depths)):
            ops = [_block(config, i) for _ in range(depth)]
            if i + 1 < len(widths):
                ops.append(Down(width, widths[i + 1], config.halves_time[i]))
            self.stages.append(Ops(*ops))
        self.project_out = Out(widths[-1], config.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.project_in(x)
        for stage in self.stages:
            x = stage(x)
        return self.project_out(x)


class Decoder(nn.Module):
    def __init__(self, config: DCAEConfig):
        super().__init__()
        widths = config.widths
        self.project_in = In(config.latent_channels, widths[-1])
        self.stages = nn.ModuleList()
        for i, (width, depth) in enumerate(zip(widths, config.decoder_depths)):
            up = [Up(widths[i + 1], width, config.halves_time[i])] if i + 1 < len(widths) else []
            self.stages.append(Ops(*up, *(_block(config, i) for _ in range(depth))))
        self.project_out = Ops(RMSNorm(widths[0]), nn.ReLU(), Conv(widths[0], 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.project_in(x)
        for stage in reversed(self.stages):
            x = stage(x)
        return self.project_out(x)


def _block(config: DCAEConfig, stage: int) -> nn.Module:
    width = config.widths[stage]
    return AttentionBlock(width) if config.attention[stage] else ResBlock(width)


class Ops(nn.Module):
    """One after another."""

    def __init__(self, *ops: nn.Module):
        super().__init__()
        self.op_list = nn.ModuleList(ops)

    def forward(self, x: Tensor) -> Tensor:
        for op in self.op_list:
            x = op(x)
        return x


class Conv(nn.Module):
    """Convolution, then a norm if it has no bias, in [B, C, T, H, W]."""

    def __init__(
        self,
        channels: int,
        out: int,
        kernel: int,
        stride: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        norm: bool = False,
    ):
        super().__init__()
        self.conv = nn.Conv3d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=bias)
        if norm:
            self.norm = RMSNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.norm(x) if hasattr(self, "norm") else x


class RMSNorm(nn.Module):
    """Over channels, in float32."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + NORM_EPS)
        return (wide * self.weight.view(-1, 1, 1, 1) + self.bias.view(-1, 1, 1, 1)).to(x.dtype)


class Residual(nn.Module):
    """`main`, and what it is added to."""

    def __init__(self, main: nn.Module):
        super().__init__()
        self.main = main

    def shortcut(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x) + self.shortcut(x)


class Down(Residual):
    """Half the size: a strided convolution, beside the means of groups of the pixels that go into channels."""

    def __init__(self, channels: int, out: int, halves_time: bool):
        self.factors = (2 if halves_time else 1, 2, 2)
        self.out = out
        super().__init__(Conv(channels, out, 3, stride=self.factors))

    def shortcut(self, x: Tensor) -> Tensor:
        return _mean_groups(_to_channels(x, _factors(self.factors, x)), self.out)


class Up(Residual):
    """Twice the size: nearest neighbours and a convolution, beside channels that are repeated and become pixels."""

    def __init__(self, channels: int, out: int, doubles_time: bool):
        self.factors = (2 if doubles_time else 1, 2, 2)
        self.out = out
        super().__init__(UpConv(channels, out, self.factors))

    def shortcut(self, x: Tensor) -> Tensor:
        factors = _factors(self.factors, x)
        wanted = self.out * factors[0] * factors[1] * factors[2]
        return _to_pixels(x.repeat_interleave(wanted // x.shape[1], 1), factors)


class UpConv(nn.Module):
    def __init__(self, channels: int, out: int, factors: tuple[int, int, int]):
        super().__init__()
        self.factors = factors
        self.conv = Conv(channels, out, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=tuple(map(float, _factors(self.factors, x))), mode="nearest"))


class Out(Residual):
    """To fewer channels, beside means of groups of them."""

    def __init__(self, channels: int, out: int):
        self.out = out
        super().__init__(Ops(Conv(channels, out, 3)))

    def shortcut(self, x: Tensor) -> Tensor:
        return _mean_groups(x, self.out)


class In(Residual):
    """To more channels, beside repeated ones."""

    def __init__(self, channels: int, out: int):
        self.repeats = out // channels
        super().__init__(Conv(channels, out, 3))

    def shortcut(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.repeats, 1)


class ResBlock(Residual):
    def __init__(self, width: int):
        super().__init__(TwoConvs(width))


class TwoConvs(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv1, self.conv2 = Conv(width, width, 3), Conv(width, width, 3, bias=False, norm=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.silu(self.conv1(x)))


class AttentionBlock(nn.Module):
    """Attention over the whole, then a gated convolution over the neighbourhood."""

    def __init__(self, width: int):
        super().__init__()
        self.context_module, self.local_module = Residual(LinearAttention(width)), Residual(GatedConv(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.local_module(self.context_module(x))


class LinearAttention(nn.Module):
    """ReLU linear attention of q, k, v and of their sums over 5 × 5 × 5 neighbourhoods; cost linear in positions."""

    def __init__(self, width: int):
        super().__init__()
        wide, heads = 3 * width, width // HEAD
        self.qkv = Conv(width, wide, 1, bias=False)
        self.aggreg = nn.ModuleList(
            [
                nn.Sequential(
                    nn.Conv3d(wide, wide, SCALE, padding=SCALE // 2, groups=wide, bias=False),
                    nn.Conv3d(wide, wide, 1, groups=3 * heads, bias=False),
                )
            ]
        )
        self.proj = Conv(2 * width, width, 1, bias=False, norm=True)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        qkv = torch.cat((qkv, *(scale(qkv) for scale in self.aggreg)), 1)
        q, k, v = qkv.flatten(2).float().unflatten(1, (-1, 3 * HEAD)).split(HEAD, 2)  # [B, heads, 32, positions]
        q, k = F.relu(q), F.relu(k)
        sums = F.pad(v, (0, 0, 0, 1), value=1.0) @ k.transpose(
            -1, -2
        )  # the last row: sums of k, that weights are divided by
        out = sums @ q
        out = out[:, :, :-1] / (out[:, :, -1:] + ATTENTION_EPS)
        return self.proj(out.to(x.dtype).flatten(1, 2).unflatten(2, x.shape[2:]))


class GatedConv(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        wide = EXPANSION * width
        self.inverted_conv = Conv(width, 2 * wide, 1)
        self.depth_conv = Conv(2 * wide, 2 * wide, 3, groups=2 * wide)
        self.point_conv = Conv(wide, width, 1, bias=False, norm=True)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.depth_conv(F.silu(self.inverted_conv(x))).chunk(2, 1)
        return self.point_conv(x * F.silu(gate))


def _factors(factors: tuple[int, int, int], x: Tensor) -> tuple[int, int, int]:
    """The time of an image stays."""
    return (1, *factors[1:]) if x.shape[2] == 1 else factors


def _mean_groups(x: Tensor, out: int) -> Tensor:
    return x.unflatten(1, (out, -1)).mean(2)


def _to_channels(x: Tensor, factors: tuple[int, int, int]) -> Tensor:
    """[B, C, T, H, W] -> [B, C · a · b · c, T/a, H/b, W/c]."""
    (a, b, c), (n, channels, t, h, w) = factors, x.shape
    x = x.view(n, channels, t // a, a, h // b, b, w // c, c)
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(n, channels * a * b * c, t // a, h // b, w // c)


def _to_pixels(x: Tensor, factors: tuple[int, int, int]) -> Tensor:
    (a, b, c), (n, channels, t, h, w) = factors, x.shape
    x = x.view(n, channels // (a * b * c), a, b, c, t, h, w)
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(n, channels // (a * b * c), t * a, h * b, w * c)
