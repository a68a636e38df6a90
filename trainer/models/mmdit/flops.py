"""Floating point operations of a forward pass of the MMDiT: what its time is measured against."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.models.mmdit.model import MMDiTConfig


@dataclass(frozen=True)
class Flops:
    """Operations (a multiplication and an addition are two) of one forward pass of one sample.

    Attributes:
        linear: of the blocks' linear layers; embeddings and modulation are left out (below a thousandth).
        attention: of q kᵀ and of weighing v.
    """

    linear: float
    attention: float

    @property
    def total(self) -> float:
        return self.linear + self.attention

    @property
    def training(self) -> float:
        """Forward and backward, nothing computed twice: three times the forward."""
        return 3 * self.total


def forward_flops(config: MMDiTConfig, tokens: int) -> Flops:
    """Operations for so many tokens, text included: for the released model 12.910 G · N + 700,416 · N²."""
    width, depth = config.hidden_size, config.depth + config.depth_single_blocks
    per_token = 2 * (4 * width * width + 2 * width * config.mlp_size)  # q, k, v, projection; both layers of the MLP
    return Flops(float(depth * per_token * tokens), float(depth * 4 * width * tokens * tokens))
