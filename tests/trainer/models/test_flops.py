"""Operations of a forward pass, counted layer by layer."""

import pytest

from trainer.models.mmdit.flops import Flops, forward_flops
from trainer.models.mmdit.model import MMDiTConfig


def test_operations_are_those_of_every_product():
    """Five blocks of width 64, MLP of 192, 10 tokens: a layer from m to n features takes 2 m n operations a token, q kᵀ
    and the weighing of v take 2 · 64 for each pair of tokens."""
    config = MMDiTConfig(hidden_size=64, num_heads=4, mlp_ratio=3.0, depth=2, depth_single_blocks=3, axes_dim=(4, 6, 6))
    layers = [(64, 64)] * 4 + [(64, 192), (192, 64)]  # q, k, v, projection; MLP
    flops = forward_flops(config, 10)
    assert flops.linear == 5 * 10 * sum(2 * m * n for m, n in layers)
    assert flops.attention == 5 * 10**2 * (2 * 64 + 2 * 64)
    assert flops.total == flops.linear + flops.attention


def test_training_takes_three_forwards():
    flops = Flops(linear=7.0, attention=4.0)
    assert flops.total == 11.0 and flops.training == 33.0


def test_the_released_model():
    """Per token 12.910 G, per pair 700,416."""
    one = forward_flops(MMDiTConfig(), 1)
    assert one.linear / 1e9 == pytest.approx(12.910, abs=0.001) and one.attention == 700_416
