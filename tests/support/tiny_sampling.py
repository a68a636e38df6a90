"""A model that samples in a blink, and prompts for it."""

from __future__ import annotations

from pathlib import Path

import torch

from sampler.prompts.prompt import Prompt
from sampler.settings import SampleSettings, load_settings
from trainer.models.mmdit.checkpoint_io import export_open_sora
from trainer.models.mmdit.model import MMDiT, MMDiTConfig

SETS = (
    "autoencoder.kind=tiny",
    "text.kind=minilm",
    "text.options.length=16",
    "video.height=32",
    "video.width=48",
    "video.num_frames=9",
    "video.fps=12",
    "sampling.steps=4",
    "sampling.guidance=3",
)
"""For the model below."""


def save_model(path: Path, seed: int = 0) -> Path:
    """Random weights that make something of noise: every layer has a part in it."""
    torch.manual_seed(seed)
    model = MMDiT(
        MMDiTConfig(
            in_channels=16,
            vec_in_dim=384,
            context_in_dim=384,
            hidden_size=48,
            num_heads=2,
            depth=1,
            depth_single_blocks=1,
            axes_dim=(8, 8, 8),
            patch_size=1,
        )
    )
    for name, parameter in model.named_parameters():
        torch.nn.init.ones_(parameter) if name.endswith("scale") else torch.nn.init.normal_(parameter, std=0.08)
    export_open_sora(model, path)
    return path


def settings(*sets: str) -> SampleSettings:
    return load_settings(None, None, [*SETS, *sets])


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"number {i} of some prompts", where=f"prompt {i}") for i in range(count)]
