"""What tells reconstructions from videos, and the losses of the game between the two (hinge GAN, as in VQGAN,
arXiv:2012.09841)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

SLOPE = 0.2
"""Of leaky ReLUs, as in pix2pix's PatchGAN (arXiv:1611.07004)."""
STD = 0.02
"""Of the weights it starts from; pix2pix's."""
GROUPS = 32
WIDEST = 8
"""Times the first layer's width."""
EPS = 1e-4
LARGEST = 1e4
"""Bounds of the adaptive weight: latent diffusion's (CompVis/latent-diffusion, LPIPSWithDiscriminator)."""


class PatchDiscriminator(nn.Module):
    """A 3D PatchGAN: for each patch of a video or image a number, high where it takes it for real.

    Each of the layers halves height and width, the first time too (one frame stays one); two more look at the
    neighbourhood. Norms are over groups of channels and not over the batch, as pix2pix's are: what is said of a sample
    depends on it alone.

    Args:
        width: channels of the first layer; they double up to eight times that.
        layers: that halve.
    """

    def __init__(self, width: int = 64, layers: int = 5):
        super().__init__()
        widths = [width * min(2**i, WIDEST) for i in range(layers + 1)]
        ops: list[nn.Module] = [nn.Conv3d(3, width, (3, 4, 4), (2, 2, 2), 1), nn.LeakyReLU(SLOPE)]
        for channels, out in zip(widths, widths[1:-1]):
            ops += [nn.Conv3d(channels, out, (3, 4, 4), (1, 2, 2), 1, bias=False), _norm(out), nn.LeakyReLU(SLOPE)]
        ops += [nn.Conv3d(widths[-2], widths[-1], 3, 1, 1, bias=False), _norm(widths[-1]), nn.LeakyReLU(SLOPE)]
        self.main = nn.Sequential(*ops, nn.Conv3d(widths[-1], 1, 3, 1, 1))
        self.smallest = 2**layers
        self.apply(_initialise)

    def forward(self, video: Tensor) -> Tensor:
        """[B, 1, t, h, w] of [B, 3, T, H, W] in −1..1.

        Raises:
            ValueError: pictures that the layers halve to nothing.
        """
        if min(video.shape[-2:]) < self.smallest:
            raise ValueError(
                f"the discriminator needs pictures of at least {self.smallest} × {self.smallest} for so many layers "
                f"(gan.layers), "
                f"not {video.shape[-2]} × {video.shape[-1]}"
            )
        return self.main(video)

    def judge(self, video: Tensor) -> Tensor:
        """The same, with a gradient for the video alone: the weights are not to learn from it."""
        fixed = {name: p.detach() for name, p in self.named_parameters()}
        return functional_call(self, fixed, (video.to(self.main[0].weight.dtype),))


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge: ½ (mean max(0, 1 − real) + mean max(0, 1 + fake))."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def generator_loss(fake: Tensor) -> Tensor:
    """Hinge: minus the mean."""
    return -fake.float().mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last: nn.Parameter) -> Tensor:
    """What makes the adversarial loss pull at the last layer as hard as the reconstruction loss does: ‖∇ rec‖ / (‖∇
    adv‖ + 1e-4), at most 1e4. Call before `backward`, which both losses still need their graphs for.

    Works where this rank holds the last layer's weights whole (DDP, ZeRO-1, ZeRO-2); the gradients are taken aside, so
    that no exchange between ranks is set off. It is that of the micro-batch, whichever rank works on it.
    """
    ours, theirs = (
        torch.autograd.grad(loss, last, retain_graph=True)[0].float().norm() for loss in (reconstruction, adversarial)
    )
    return (ours / (theirs + EPS)).clamp(max=LARGEST).detach()


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(GROUPS, channels), channels)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv3d):
        nn.init.normal_(module.weight, 0.0, STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.GroupNorm):
        nn.init.normal_(module.weight, 1.0, STD)
