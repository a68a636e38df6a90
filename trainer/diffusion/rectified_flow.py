"""Rectified flow: the objective, the schedule, the guidance and the sampling loop of Open-Sora 2.0; one definition for
training and sampling.

Time runs from 0 (data) to 1 (noise); the model gives the velocity from data to noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SIGMA_MIN = 1e-5
"""Of the data that is left at time 1."""
SHIFT_TOKENS = (256, 4096)
SHIFT_RANGE = (1.0, 3.0)
"""Shift of one frame of so many tokens, linear between; times the root of the number of latent frames."""
STEADY_STEPS = 10
"""Guidance is on at every step so long; then at every other one only."""

Velocity = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(latents [B, c, T, H, W], condition [B, c + 1, T, H, W], text states, pooled text, time [B]) -> velocity as the
latents."""


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance on text and on the image condition.

    Attributes:
        text, image: scales; 1 is none.
        oscillate: past the first ten steps, none on odd steps.
        over_frames: the scale of the image rises from 1 on the first latent frame to its value on the last, a value
            that itself falls to 1 over the steps (image to video).
    """

    text: float = 7.5
    image: float = 3.0
    oscillate: bool = True
    over_frames: bool = False

    def scales(self, step: int, steps: int, frames: int) -> tuple[float, Tensor]:
        """Scale of the text, and of the image for each latent frame, at a step."""
        if self.oscillate and step >= STEADY_STEPS and step % 2:
            return 1.0, torch.ones(frames)
        if self.over_frames and self.image > 1:
            upper = torch.linspace(self.image, 1.0, steps + 1)[step].item()
            return self.text, torch.linspace(1.0, upper, frames)
        return self.text, torch.full((frames,), self.image)

    def weights(self, step: int, steps: int, frames: int, given: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Of the velocities c (with text and image), u (without text) and u2 (with neither), for each latent frame,
        [frames] each.

        Args:
            given: whether there is an image; without one u is u2.
        """
        text, image = self.scales(step, steps, frames)
        image = image if given else torch.ones(frames)
        return torch.full_like(image, text), image - text, 1 - image


@dataclass(frozen=True)
class Text:
    """States [B, L, D] and pooled embedding [B, V] of prompts."""

    states: Tensor
    pooled: Tensor


def shift(frames: int, height: int, width: int, patch: int = 2) -> float:
    """How far a schedule leans towards noise.

    Args:
        frames, height, width: of the latents.
        patch: side of a token, in latents.
    """
    tokens = height * width / patch**2
    (few, many), (least, most) = SHIFT_TOKENS, SHIFT_RANGE
    return (least + (most - least) * (tokens - few) / (many - few)) * math.sqrt(frames)


def shifted(t: Tensor, alpha: float) -> Tensor:
    """Times moved towards 1 by a shift: αt / (1 + (α − 1)t)."""
    return alpha * t / (1 + (alpha - 1) * t)


def schedule(steps: int, alpha: float) -> Tensor:
    """[steps + 1] times from 1 to 0, float64."""
    return shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64), alpha)


def noised(latents: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """What the model sees at times t, and the velocity that it should give: the objective of training.

    Args:
        latents, noise: [B, c, T, H, W].
        t: [B] in 0 (data) to 1 (noise).
    """
    t = t.view(-1, *[1] * (latents.dim() - 1))
    return (1 - t) * latents + (1 - (1 - SIGMA_MIN) * (1 - t)) * noise, (1 - SIGMA_MIN) * noise - latents


def training_time(normal: Tensor, alpha: float) -> Tensor:
    """Times to train at, from numbers of a standard normal distribution: their sigmoid, shifted as the sampling
    schedule is."""
    return shifted(torch.sigmoid(normal), alpha)


def losses(velocity: Tensor, target: Tensor) -> Tensor:
    """Mean square error of each sample, [B], float32."""
    return (velocity.float() - target.float()).square().flatten(1).mean(1)


def velocity_of(model: nn.Module, patch: int = 2) -> Velocity:
    """An MMDiT on latents: packs what goes in and unpacks what comes out.

    Args:
        model: takes `cond` or not, as its config says (`trainer.models.mmdit.model.MMDiT`).
        patch: side of a token, in latents.
    """

    def velocity(
        x: Tensor, cond: Tensor | None, states: Tensor, pooled: Tensor, t: Tensor, guidance: Tensor | None = None
    ) -> Tensor:
        batch, _, frames, height, width = x.shape
        found = model(
            img=pack(x, patch),
            img_ids=positions(batch, frames, height, width, patch, x.device),
            txt=states,
            txt_ids=torch.zeros(batch, states.shape[1], 3, device=x.device),
            timesteps=t,
            y_vec=pooled,
            cond=pack(cond, patch) if cond is not None else None,
            guidance=guidance,
        )
        return unpack(found, frames, height, width, patch)

    return velocity


def condition(mask: Tensor, reference: Tensor) -> Tensor:
    """What the model is told of given frames: [B, 1, T, H, W] ones where they are, and latents [B, c, T, H, W], zero
    elsewhere."""
    return torch.cat((mask, reference), 1)


@torch.no_grad()
def denoise(
    velocity: Velocity,
    noise: Tensor,
    cond: Tensor,
    text: Text,
    empty: Text,
    steps: int = 50,
    guidance: Guidance = Guidance(),
    patch: int = 2,
    alpha: float | None = None,
    run: int | None = None,
    on_step: Callable[[int, int], None] = lambda step, forwards: None,
) -> Tensor:
    """Euler's method from noise to latents. Of the three velocities (with text c, without u, without text and image
    u2), those are computed that change the result: v = g_txt·c + (g_img − g_txt)·u + (1 − g_img)·u2.

    Args:
        noise: [B, c, T, H, W].
        cond: [B, c + 1, T, H, W], see `condition`; all zero: text alone.
        empty: the same for empty prompts, or negative ones.
        alpha: shift of the schedule; None: `shift` of the noise's shape.
        run: stop after so many of the steps; None: all.
        on_step: called after each step with its index and how many forwards of the batch it took.

    Returns:
        latents, [B, c, T, H, W]. Given frames are near their reference, not equal to it: see `keep_given`.
    """
    batch, _, frames, height, width = noise.shape
    times = schedule(steps, shift(frames, height, width, patch) if alpha is None else alpha).tolist()
    given = bool(cond.any())
    x = noise
    for step, (t, t_next) in enumerate(zip(times[:-1][:run], times[1:])):
        on_c, on_u, on_u2 = (scale.to(x).view(-1, 1, 1) for scale in guidance.weights(step, steps, frames, given))
        branches = [(text, cond, on_c), (empty, cond, on_u), (empty, torch.zeros_like(cond), on_u2)]
        branches = [branch for branch in branches if branch[2].any()]
        found = velocity(
            x.repeat(len(branches), 1, 1, 1, 1),
            torch.cat([c for _, c, _ in branches]),
            torch.cat([p.states for p, _, _ in branches]),
            torch.cat([p.pooled for p, _, _ in branches]),
            torch.full((len(branches) * batch,), t, dtype=x.dtype, device=x.device),
        )
        v = sum(scale * part for (_, _, scale), part in zip(branches, found.chunk(len(branches))))
        x = x + (t_next - t) * v
        on_step(step, len(branches))
    return x


def forwards(steps: int, guidance: Guidance, frames: int, given: bool, run: int | None = None) -> int:
    """How many evaluations of the model a sample takes (`denoise`).

    Args:
        frames: latent ones; given: whether any of them is.
        run: see `denoise`.
    """
    return sum(
        sum(bool(weight.any()) for weight in guidance.weights(step, steps, frames, given))
        for step in range(steps)[:run]
    )


def keep_given(latents: Tensor, cond: Tensor) -> Tensor:
    """The latents with the given frames of each sample in their places."""
    mask, reference = cond[:, :1], cond[:, 1:]
    return torch.where(mask > 0, reference, latents)


def pack(latents: Tensor, patch: int = 2) -> Tensor:
    """[B, c, T, H, W] -> [B, T · H/p · W/p, c · p · p]."""
    b, c, t, h, w = latents.shape
    x = latents.view(b, c, t, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 3, 5, 1, 4, 6).reshape(b, t * (h // patch) * (w // patch), c * patch**2)


def unpack(tokens: Tensor, frames: int, height: int, width: int, patch: int = 2) -> Tensor:
    """The way back; height and width are those of the latents."""
    b, _, features = tokens.shape
    x = tokens.view(b, frames, height // patch, width // patch, features // patch**2, patch, patch)
    return x.permute(0, 4, 1, 2, 5, 3, 6).reshape(b, -1, frames, height, width)


def positions(
    batch: int, frames: int, height: int, width: int, patch: int = 2, device: torch.device | None = None
) -> Tensor:
    """[B, N, 3]: (t, h, w) of each token, in patches."""
    axes = torch.meshgrid(
        *(torch.arange(n, device=device) for n in (frames, height // patch, width // patch)), indexing="ij"
    )
    return torch.stack(axes, -1).flatten(0, 2).float().expand(batch, -1, -1)
