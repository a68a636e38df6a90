"""Noise to latents by a diffusion transformer and the settings of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sampler.settings import SamplingSettings
from trainer.diffusion.conditioning import MODES
from trainer.diffusion.rectified_flow import Guidance, Text, condition, denoise, forwards, keep_given
from trainer.models.common.dit_architecture import Architecture


class Denoiser:
    """Args:
    model: of the architecture, in any floating-point dtype; states and schedule stay float32.
    """

    def __init__(self, architecture: Architecture, model: Callable[..., Tensor], settings: SamplingSettings):
        self.settings, self.architecture = settings, architecture
        self._dtype = next(model.parameters()).dtype if isinstance(model, nn.Module) else torch.float32
        self._plain = architecture.velocity(model)

    def forwards(self, mode: str, frames: int) -> int:
        """Evaluations of the model for each sample.

        Args:
            frames: latent ones.
        """
        return forwards(self.settings.steps, guidance_of(self.settings, mode), frames, _gives(mode))

    @torch.no_grad()
    def __call__(
        self,
        noise: Tensor,
        cond: Tensor | None,
        text: Text,
        negative: Text,
        mode: str = "t2v",
        on_step: Callable[[int, int], None] = lambda step, forwards: None,
    ) -> Tensor:
        """Latents [B, c, T, H, W], the given frames of each sample in their places.

        Args:
            noise: [B, c, T, H, W].
            cond: [B, c + 1, T, H, W], see `trainer.diffusion.rectified_flow.condition`; None: nothing is given.
            text, negative: of each sample.
            mode: see `trainer.diffusion.conditioning`.
            on_step: see `trainer.diffusion.rectified_flow.denoise`.
        """
        if cond is None:
            cond = condition(torch.zeros_like(noise[:, :1]), torch.zeros_like(noise))
        own = self.settings
        found = denoise(
            self._velocity,
            noise,
            cond,
            text,
            negative,
            own.steps,
            guidance_of(own, mode),
            self.architecture.patch,
            own.shift,
            on_step=on_step,
        )
        return keep_given(found, cond)

    def _velocity(self, x: Tensor, cond: Tensor, states: Tensor, pooled: Tensor, t: Tensor) -> Tensor:
        given = cond.to(self._dtype) if self.architecture.takes_condition else None
        return self._plain(x.to(self._dtype), given, states.to(self._dtype), pooled.to(self._dtype), t).float()


def guidance_of(settings: SamplingSettings, mode: str) -> Guidance:
    """The scale on the references changes over frames and steps for pictures only, as in Open-Sora 2.0."""
    over_frames = settings.image_over_frames and mode.startswith("i2v")
    return Guidance(settings.guidance, settings.image_guidance, settings.oscillate, over_frames)


def _gives(mode: str) -> bool:
    return bool(MODES[mode].head or MODES[mode].tail)


def texts(found: Sequence[Text]) -> Text:
    """Of several samples, as one."""
    return Text(*(torch.cat([getattr(part, name) for part in found]) for name in ("states", "pooled")))
