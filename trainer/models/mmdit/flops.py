"""Floating point operations of a forward pass of the MMDiT: what its time is measured against."""

from __future__ import annotations

from trainer.models.common.dit_architecture import Flops
from trainer.models.mmdit.model import MMDiTConfig


def forward_flops(config: MMDiTConfig, tokens: int) -> Flops:
    """Operations for so many tokens, text included: for the released model 12.910 G · N + 700,416 · N²."""
    width, depth = config.hidden_size, config.depth + config.depth_single_blocks
    per_token = 2 * (4 * width * width + 2 * width * config.mlp_size)  # q, k, v, projection; both layers of the MLP
    return Flops(float(depth * per_token * tokens), float(depth * 4 * width * tokens * tokens))
