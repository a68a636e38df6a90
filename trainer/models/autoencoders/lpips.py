"""How different two pictures look: LPIPS (arXiv:1801.03924), from weights that come in a package or from the published
ones.

The package lpips 0.1.4 downloads its network when it is built and has NaN for a gradient where no feature fires;
stlpips-pytorch's own class, which the tests compare with, imports IPython and torchsummary."""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datakit.dependencies import install_command
from datakit.errors import ConfigError, MissingDependency
from trainer.models.common.weights import load_weights, read_weights

Kind = Literal["alex-st", "vgg-st", "alex", "vgg"]
KINDS: tuple[Kind, ...] = ("alex-st", "vgg-st", "alex", "vgg")
SMALLEST = 32
"""Sides of a picture, in pixels: below that, the deepest layers have nothing left."""
EPS = 1e-10
"""Of LPIPS's unit vectors."""
PACKAGED = "weights/vST0.0/{}_shift_tolerant.pth"
"""In stlpips-pytorch 0.0.2, which is not imported: it needs IPython and torchsummary, for nothing that is used here."""
LEARNED = ("lin{}.model.1.weight", "lins.{}.model.1.weight")
"""Names of the layers' weights in published files."""
IGNORED = ("classifier.*", "scaling_layer.*")
"""In published files, but not needed: the end of the network, and constants."""


class Perceptual(nn.Module):
    """LPIPS: the mean squared difference of unit feature vectors, weighed by channel as people judge, of five layers of
    a network that was trained to classify; 0: the same.

    `alex`, `vgg`: version 0.1 of LPIPS. `alex-st`, `vgg-st`: ST-LPIPS (arXiv:2207.13686), which minds a shift by a
        pixel less: it
    blurs before it samples. Distances of different kinds are not to be compared.
    """

    def __init__(self, kind: Kind):
        super().__init__()
        slices, channels = _vgg(kind == "vgg-st") if kind.startswith("vgg") else _alex(kind == "alex-st")
        self.kind = kind
        self.net = nn.ModuleDict(
            {f"slice{i + 1}": nn.Sequential(OrderedDict(layers)) for i, layers in enumerate(slices)}
        )
        self.lin = nn.ParameterList(torch.zeros(1, count, 1, 1) for count in channels)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        """Distances [N] of pictures [N, 3, H, W] in −1..1, with gradients for both.

        Raises:
            ValueError: pictures below 32 × 32.
        """
        if min(one.shape[-2:]) < SMALLEST:
            size = f"{one.shape[-2]} × {one.shape[-1]}"
            raise ValueError(f"perceptual distances need pictures of at least {SMALLEST} × {SMALLEST}, not {size}")
        a, b = ((x.float() - self.shift) / self.scale for x in (one, other))
        total = torch.zeros(len(one), device=one.device)
        for layers, weight in zip(self.net.values(), self.lin):
            a, b = layers(a), layers(b)
            total = total + F.conv2d((_unit(a) - _unit(b)).square(), weight).mean((1, 2, 3))
        return total

    def of_videos(self, one: Tensor, other: Tensor, frames: Tensor | None = None) -> Tensor:
        """Mean distances [B] over the frames of videos [B, 3, T, H, W].

        Args:
            frames: [B, n] which ones; None: all.
        """
        if frames is not None:
            rows = torch.arange(len(one), device=one.device)[:, None]
            one, other = (x.transpose(1, 2)[rows, frames.to(x.device)].transpose(1, 2) for x in (one, other))
        return self(*(x.transpose(1, 2).flatten(0, 1) for x in (one, other))).view(len(one), -1).mean(1)


def build_perceptual(kind: Kind, weights: Sequence[str | Path] = ()) -> Perceptual:
    """The distance with its weights, on the CPU, frozen.

    Args:
        weights: sources as `read_weights` takes them, joined: one or several that have the network (torchvision's
            names, `features.0.weight` …, or LPIPS's, `net.slice1.0.weight` …) and the weights of the layers
            (`lin0.model.1.weight` …, as in `lpips/weights/v0.1/vgg.pth` of the package lpips). Empty: those in
            stlpips-pytorch, for the shift-tolerant kinds.

    Raises:
        ConfigError: weights that are not given or do not fit.
        MissingDependency: weights that are not on this machine.
    """
    if not weights:
        weights = [_packaged(kind)]
    state: dict[str, Tensor] = {}
    for source in weights:
        state |= read_weights(source)
    model = Perceptual(kind)
    names = _names(model)
    load_weights(model, {names.get(name, name): tensor for name, tensor in state.items()}, allow_unexpected=IGNORED)
    return model


def _packaged(kind: Kind) -> Path:
    if not kind.endswith("-st"):
        raise ConfigError(
            f"perceptual distance {kind} needs weights: give files that have the network and LPIPS's layers, or take "
            f"{kind}-st"
        )
    found = importlib.util.find_spec("stlpips_pytorch")
    if found is None:
        raise MissingDependency(
            f"the perceptual distance needs the weights in stlpips-pytorch: {install_command('train')}"
        )
    return Path(found.submodule_search_locations[0]) / PACKAGED.format(kind.removesuffix("-st"))


def _names(model: Perceptual) -> dict[str, str]:
    """Names in published files to ours."""
    names = {pattern.format(i): f"lin.{i}" for i in range(len(model.lin)) for pattern in reversed(LEARNED)}
    for own in model.state_dict():
        if own.startswith("net."):
            names["features." + own.split(".", 2)[2]] = own
    return names


def _unit(features: Tensor) -> Tensor:
    """Of length 1 over channels. The norm's gradient is 0 where all features are, not NaN."""
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + EPS)


Layers = list[tuple[str, nn.Module]]


def _vgg(tolerant: bool) -> tuple[list[Layers], list[int]]:
    """VGG-16's convolutions (arXiv:1409.1556) up to each pooling; layers are numbered as in torchvision."""
    blocks = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
    slices, number, channels = [], 0, 3
    for i, block in enumerate(blocks):
        layers = [] if i == 0 else [nn.MaxPool2d(2, 1), Blur(channels)] if tolerant else [nn.MaxPool2d(2)]
        for out in block:
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU()]
            channels = out
        slices.append([(str(number + j), layer) for j, layer in enumerate(layers)])
        number += len(layers)
    return slices, [block[-1] for block in blocks]


def _alex(tolerant: bool) -> tuple[list[Layers], list[int]]:
    """AlexNet's convolutions (torchvision's, arXiv:1404.5997)."""
    pool = (lambda c: [nn.MaxPool2d(3, 1), Blur(c)]) if tolerant else (lambda c: [nn.MaxPool2d(3, 2)])
    first = [nn.Conv2d(3, 64, 11, 1, padding=2), Blur(64)] if tolerant else [nn.Conv2d(3, 64, 11, 4, padding=2)]
    parts = [
        [*first, nn.ReLU()],
        [*pool(64), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU()],
        [*pool(192), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()],
        [nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()],
        [nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()],
    ]
    slices, number = [], 0
    for layers in parts:
        slices.append([(str(number + j), layer) for j, layer in enumerate(layers)])
        number += len(layers)
    return slices, [64, 192, 384, 256, 256]


class Blur(nn.Module):
    """Every second value of a blurred picture (arXiv:1904.11486), two pixels of mirrored border around."""

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("filt", torch.zeros(channels, 1, 3, 3))  # comes with the weights

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), self.filt, stride=2, groups=x.shape[1])
