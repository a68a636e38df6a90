"""Settings of an MMDiT to train. Defaults: Open-Sora 2.0's."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trainer.models.common.settings import DiTModelSettings

Positive = Annotated[int, Field(gt=0)]


class MMDiTSettings(DiTModelSettings):
    """An MMDiT. Features of tokens and texts follow from the autoencoder and the text encoder."""

    hidden_size: Positive = 3072
    """Features of a token inside the network."""
    num_heads: Positive = 24
    """Attention heads."""
    depth: Positive = 19
    """Double blocks: text and video have weights of their own."""
    depth_single_blocks: Positive = 38
    """Single blocks: text and video share weights."""
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    """Width of the MLP, in hidden sizes."""
    axes_dim: tuple[int, int, int] = (16, 56, 56)
    """Features of a head that rotary positions take: time, height, width."""
    patch_size: Literal[1, 2] = 2
    """Latents along a side of a token."""
    recompute: tuple[int, int] = (0, 0)
    """Double and single blocks that are computed again in the backward pass."""
    keep_attention: bool = True
    """Of recomputed blocks, keep the attention's output."""
